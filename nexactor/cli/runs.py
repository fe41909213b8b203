"""`nexactor runs` and `nexactor show RUN`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import STYLES, clock, count, one_line, seconds, shortest_prefixes, to_json
from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.events.log import EventLog
    from nexactor.events.projections import AgentTree, RunSummary, RunTree, Step


async def all_runs(log: EventLog) -> dict[str, RunSummary]:
    """Every run of the log by its id, oldest first."""
    from nexactor.events.cursor import START
    from nexactor.events.log import Filter
    from nexactor.events.projections import RUN_KINDS, list_runs

    found: dict[str, RunSummary] = {}
    async for recorded in log.subscribe(START, filter=Filter(kinds=RUN_KINDS), follow=False):
        found = list_runs(found, recorded)
    return found


async def resolve_run(log: EventLog, given: str) -> str:
    """The id of the one run that starts with `given`; `last` is the newest. ConfigError for none or several."""
    from nexactor.events.cursor import START
    from nexactor.events.log import Filter

    ids: list[str] = []
    async for recorded in log.subscribe(START, filter=Filter(types=("RunStarted",)), follow=False):
        run = recorded.envelope.run
        if run == given:
            return run
        if given == "last" or (given and run.startswith(given)):
            ids.append(run)
    if not ids:
        raise ConfigError(f"there is no run {given!r} in this log: `nexactor runs` lists them")
    if given != "last" and len(ids) > 1:
        some = "\n  ".join(ids[:10])
        raise ConfigError(f"{len(ids)} runs start with {given!r}; write more of the id:\n  {some}")
    return ids[-1]


def runs(
    context: typer.Context,
    status: Annotated[
        str, typer.Option(metavar="STATUS", help="Only: running, finished, failed or cancelled.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="A JSON array of all fields.")] = False,
) -> None:
    """List runs, the newest last, with their status, model calls, tool calls, tokens and time."""
    known = ("starting", "running", "finished", "failed", "cancelled")
    if status and status not in known:
        raise ConfigError(f"--status {status!r} is none of {', '.join(known)}")

    async def read() -> dict[str, RunSummary]:
        async with open_log(settings_of(context)) as log:
            return await all_runs(log)

    found = run_async(read())
    chosen = [s for s in found.values() if status in ("", s.status)]
    shown = chosen[-limit:]
    if json:
        typer.echo(to_json(shown))
        return
    _print_table(shown, shortest_prefixes(found))
    if len(shown) < len(chosen):
        Console().print(f"[dim]{count(len(chosen) - len(shown), 'older run')}; --limit shows more[/dim]")


def _print_table(shown: Sequence[RunSummary], short: Mapping[str, str]) -> None:
    """The table, as wide as the terminal: tasks are cut, never ids, which people copy."""
    now = time.time_ns()
    rows = [
        (
            short[s.run],
            s.agent,
            s.task,
            s.status,
            str(s.agents),
            _with_failures(s.model_calls, s.model_calls_failed),
            _with_failures(s.tool_calls, s.tool_calls_failed),
            f"{s.prompt_tokens + s.completion_tokens:,}",
            seconds(s.duration(now)),
            "" if s.reward is None else f"{s.reward:.2f}",
        )
        for s in shown
    ]
    names = ("run", "agent", "task", "status", "agents", "model", "tool", "tokens", "time", "reward")
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    others = sum(w + 2 for name, w in zip(names, widths, strict=True) if name != "task")
    console = Console()
    task = max(console.width - others, 20)
    console = Console(width=max(console.width, others + task), highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in names[:4] else "right")
    for run, agent, text, status, *numbers in rows:
        colour = STYLES.get(status, "")
        table.add_row(run, agent, Text(one_line(text, task)), Text(status, style=colour), *numbers)
    console.print(table)


def _with_failures(done: int, failed: int) -> str:
    return f"{done + failed} ({failed} failed)" if failed else str(done)


def show(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, a unique start of it, or `last`.")],
    json: Annotated[bool, typer.Option("--json", help="The tree as one JSON object.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Whole texts instead of one line each.")] = False,
) -> None:
    """Show a run as a tree: agents, model calls, tool calls, tokens, time, rewards.

    The number before a step is its index in the run's total order of events.
    """

    async def read() -> RunTree:
        from nexactor.events.cursor import START
        from nexactor.events.log import Filter
        from nexactor.events.projections import run_tree

        async with open_log(settings_of(context)) as log:
            id = await resolve_run(log, run)
            events = [r async for r in log.subscribe(START, filter=Filter(run=id), follow=False)]
            return run_tree(id, events)

    tree = run_async(read())
    if json:
        typer.echo(to_json(msgspec.to_builtins(tree, str_keys=True)))
        return
    console = Console()
    console.print(render_tree(tree, time.time_ns(), width=None if full else max(console.width - 24, 40)))


def render_tree(tree: RunTree, now: int, *, width: int | None) -> Tree:
    """A run's tree for rich; texts are cut to one line of `width` characters unless it is None."""
    s = tree.summary
    title = Text(f"run {s.run} ", style="bold").append(s.status, style=STYLES.get(s.status, ""))
    facts = [
        seconds(s.duration(now)),
        count(s.events, "event"),
        count(s.agents, "agent"),
        count(s.model_calls, "model call"),
        count(s.tool_calls + s.tool_calls_failed, "tool call"),
        f"{s.prompt_tokens:,} + {s.completion_tokens:,} tokens",
    ]
    if s.cached_tokens:
        facts.append(f"{s.cached_tokens:,} cached")
    if s.takeovers:
        facts.append(count(s.takeovers, "takeover"))
    title.append(f"\n{clock(s.started)}, " if s.started else "\n", style="dim").append(
        ", ".join(facts), style="dim"
    )
    if s.labels:
        title.append("\n" + " ".join(f"{k}={v}" for k, v in s.labels.items()), style="dim")
    top = Tree(title, guide_style="dim")
    if tree.root is not None:
        _add_agent(top, tree.root, width)
    for orphan in tree.orphans:
        _add_agent(top, orphan, width)
    for reward in tree.rewards:
        parts = ", ".join(f"{k} {v:g}" for k, v in reward.parts.items())
        line = Text("reward ", style="bold cyan").append(f"{reward.reward:g} by {reward.source}")
        if reward.target:
            line.append(f" for {reward.target}")
        top.add(line.append(f" ({parts})" if parts else "", style="dim"))
    for annotation in tree.annotations:
        top.add(Text(f"{annotation.key}: ", style="cyan").append(_cut(annotation.value, width)))
    return top


def _cut(text: str, width: int | None) -> str:
    return text if width is None else one_line(text, width)


def _head(index: int, label: str, name: str, status: str) -> Text:
    text = Text(f"{index:>4} ", style="dim").append(f"{label} ", style="bold").append(name)
    if status not in ("ok", "finished"):
        text.append(f" {status}", style=STYLES.get(status, ""))
    return text


def _add_agent(above: Tree, agent: AgentTree, width: int | None) -> None:
    line = _head(agent.index, "agent", agent.name, agent.status)
    details = [seconds(agent.ended - agent.started)] if agent.ended and agent.started else []
    details.append(f"on {', then '.join(dict.fromkeys(agent.nodes))}" if agent.nodes else "not activated")
    line.append(f"  {', '.join(details)}", style="dim")
    if agent.input:
        line.append(f"\n     {_cut(agent.input, width)}", style="italic")
    branch = above.add(line)
    for step in agent.steps:
        if step.agent is not None:
            _add_agent(branch, step.agent, width)
        else:
            branch.add(_step_line(step, width))
    if agent.status not in ("running", "finished") or agent.result:
        branch.add(
            Text("     = ", style="dim").append(_cut(agent.result, width), style=STYLES.get(agent.status, ""))
        )


def _step_line(step: Step, width: int | None) -> Text:
    if step.kind == "note":
        return Text(f"{step.index:>4} ", style="dim").append(_cut(step.output, width), style="magenta")
    line = _head(step.index, step.kind, step.name, step.status)
    details = []
    if step.ended:
        details.append(seconds(step.duration))
    if step.kind == "model" and step.status == "ok":
        cached = f", {step.cached_tokens} cached" if step.cached_tokens else ""
        details.append(f"{step.prompt_tokens} + {step.completion_tokens} tokens{cached}")
        details += [f"policy {step.policy_version}"] if step.policy_version else []
        details += (
            [f"ended by {step.finish_reason}"] if step.finish_reason in ("length", "content_filter") else []
        )
        details += ["re-attached"] if step.reattached else []
    if step.attempts > 1:
        details.append(f"{step.attempts} attempts")
    line.append(f"  {', '.join(details)}", style="dim")
    if step.input:
        line.append(f"\n     {_cut(step.input, width)}", style="italic")
    answer = " ".join(filter(None, (step.output, *step.tool_calls)))
    if answer:
        line.append(
            f"\n     → {_cut(answer, width)}", style="red" if step.status in ("failed", "unknown") else ""
        )
    return line
