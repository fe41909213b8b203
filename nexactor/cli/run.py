"""`nexactor run SPEC TASK`: give a task to an agent and watch it work."""

from __future__ import annotations

import os
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from nexactor.cli.context import Settings, run_async, settings_of
from nexactor.cli.present import one_line, to_json
from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.events.envelope import Recorded
    from nexactor.system import Run, RunResult, System


def run(
    context: typer.Context,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="The agent's YAML file.")] = "",
    task: Annotated[str, typer.Argument(metavar="TASK", help="What it is to do.")] = "",
    workspace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder its file and shell tools work in (default: this one)."),
    ] = None,
    resume: Annotated[str, typer.Option(metavar="RUN", help="Go on with a run that was interrupted.")] = "",
    detach: Annotated[
        bool, typer.Option("--detach", help="Only start it; nodes started elsewhere do the work.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Run an agent on a task; its events are shown as they happen.

    The task is durable before anything else happens: Ctrl-C leaves a run that `--resume` (or any node) goes on with.
    The endpoint is what the file's llm_config says, by default OPENAI_BASE_URL and OPENAI_API_KEY.
    """
    if resume and (spec or task):
        raise ConfigError("--resume takes no SPEC and no TASK: the run has them")
    if not resume and not (spec and task):
        raise ConfigError(
            'say which agent and what to do: nexactor run examples/coder/agent.yaml "fix the tests"'
        )
    settings = settings_of(context)
    console = Console(stderr=json, highlight=False)
    result = run_async(_run(settings, spec, task, workspace, resume, detach, console))
    if json:
        typer.echo(to_json(msgspec.to_builtins(result)))
    elif not detach:
        console.print(Text(result.result, style="" if result.status == "finished" else "red"))
    if result.status not in ("finished", "started"):
        raise typer.Exit(1)


async def _run(
    settings: Settings,
    spec: str,
    task: str,
    workspace: Path | None,
    resume: str,
    detach: bool,
    console: Console,
) -> RunResult:
    from nexactor.spec_yaml import load_spec
    from nexactor.system import Run, RunResult, System

    tree = load_spec(spec, env=endpoint_env()) if spec else None
    where = workspace or Path.cwd()
    if not where.is_dir():
        raise ConfigError(f"--workspace {where}: there is no such folder")
    async with System(
        data=settings.data,
        url=settings.url,
        namespace=settings.namespace,
        name="run",
        host=not detach,
        journal=settings.ledger("run"),
    ) as system:
        if tree is not None:
            started = await system.start(tree, task, workspace=where)
        else:
            from nexactor.cli.runs import resolve_run

            started = Run(system, await resolve_run(system.log, resume))
        if detach:
            console.print(
                f"run [bold]{started.id}[/bold] waits for a node; `nexactor tail --run {started.id[:13]}`"
            )
            return RunResult(started.id, "started", "")
        console.print(f"run [bold]{started.id}[/bold]", style="dim")
        return await _watch(system, started, console)


async def _watch(system: System, run: Run, console: Console) -> RunResult:
    """Print the run's events until it ends."""
    from nexactor.events.cursor import START
    from nexactor.events.log import Filter
    from nexactor.events.types import RunFinished
    from nexactor.system import RunResult

    async with aclosing(system.log.subscribe(START, filter=Filter(run=run.id))) as events:
        async for recorded in events:
            line = describe(recorded, console.width)
            if line is not None:
                console.print(line)
            if isinstance(recorded.event, RunFinished):
                return RunResult(run.id, recorded.event.status, recorded.event.result)
    raise ConfigError(f"the log ended before run {run.id} did: `nexactor run --resume {run.id}` goes on")


def describe(recorded: Recorded, width: int) -> Text | None:
    """One line for what a person wants to follow; None for the rest."""
    from nexactor.events import types as ev

    who = recorded.stream.split("/", 2)[2:]
    line = Text(f"{who[0] if who else 'root'}: ", style="cyan")
    match recorded.event:
        case ev.ModelCallFinished() as e:
            said = e.message.content or " ".join(f"{c.name}{c.arguments}" for c in e.message.tool_calls)
            line.append(said)
        case ev.ToolCallFinished() as e:
            line.append(f"{e.name} → {e.result}", style="dim")
        case ev.ToolCallFailed() as e:
            line.append(f"{e.name} failed: {e.error}", style="red")
        case ev.SubAgentStarted() as e:
            line.append(f"hands to {e.name}: {e.input}", style="magenta")
        case ev.AgentFailed() as e:
            line.append(f"failed: {e.error}", style="bold red")
        case _:
            return None
    return Text(one_line(line.plain, max(width - 1, 40)), spans=line.spans)


def endpoint_env() -> dict[str, str]:
    """The environment, with what the examples' `${env.…}` fall back to: OpenAI's own endpoint."""
    return {"OPENAI_BASE_URL": "https://api.openai.com/v1", **os.environ}
