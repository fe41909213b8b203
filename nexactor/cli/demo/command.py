"""The `nexactor demo` command: options, progress on the terminal, the table at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import nexactor
from nexactor.cli.context import run_async
from nexactor.cli.present import to_json

Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Where everything goes; replaces an earlier demo there.")
]
Minutes = Annotated[
    float, typer.Option(min=1, help="The time it may take; below 25 it does less of everything.")
]
PolicyName = Annotated[str, typer.Option(help="A policy's name, folder or GGUF; `tiny` checks the plumbing.")]
Team = Annotated[Path, typer.Option(metavar="SPEC", help="The two-level team that takes the tasks.")]
Json = Annotated[bool, typer.Option("--json", help="The summary as one JSON object on stdout.")]

ZEROS = (
    "runs_lost",
    "runs_failed",
    "events_lost",
    "model_calls_repeated",
    "effects_repeated",
    "learner_steps_irregular",
    "replays_failed",
)
KINDS = 4
"""Kinds of process, each of which the demo must have killed."""


def demo(
    out: Out = Path(".nexactor/demo"),
    minutes: Minutes = 25.0,
    policy: PolicyName = "smollm2-135m",
    agent: Team = Path("examples/workspace/agent.yaml"),
    json: Json = False,
) -> None:
    """The main job, end to end: held-out tasks, demonstrations, training from the live log, held-out tasks again.

    In between, a node, the broker, the policy server and the learner are killed with SIGKILL and started again; the
    log and independent ledgers are compared at the end. Writes summary.json and learning_curve.png to --out.
    """
    from nexactor.cli.demo.main import Demo
    from nexactor.cli.demo.plan import plan

    if not agent.is_file() and not agent.is_absolute():
        # The default works from anywhere where the examples lie beside the package, as in a checkout.
        agent = Path(nexactor.__file__).parents[1] / agent
    console = Console(stderr=json, highlight=False)
    view = _View(console)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.0f} s[/dim]  {line}")

    with view.progress:
        summary = run_async(
            Demo(out=out, policy=policy, agent=agent, plan=plan(minutes), say=say, tick=view.tick).run()
        )
    console.print(_table(summary))
    console.print(f"\nsummary:        {out / 'summary.json'}\nlearning curve: {out / 'learning_curve.png'}")
    console.print(f"look around:    nexactor --data {out / 'data'} runs")
    if json:
        typer.echo(to_json(summary))
    complete = len(summary["kills"]) == KINDS and summary["replays_verified"] == summary["runs"]
    if any(summary[k] for k in ZEROS) or not complete:
        raise typer.Exit(1)


class _View:
    """Progress bars, one a phase; where there is no terminal, a line at every tenth of one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def tick(self, phase: str, done: int, total: int) -> None:
        """`phase` may carry changing details in parentheses; what is before them names the bar."""
        name = phase.split(" (")[0]
        if self.console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self.progress.add_task(phase, total=total)
            self.progress.update(self._tasks[name], description=phase, completed=done, total=total)
            return
        tenth = 10 * done // max(total, 1)
        if tenth != self._tenths.get(name):
            self._tenths[name] = tenth
            self.console.print(f"          {phase}: {done} of {total}")


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="what happened", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    low, high = summary["success_before_interval"]
    rows: list[tuple[str, str]] = [
        ("held-out success before", f"{summary['success_before']:.1%}  [{low:.1%}, {high:.1%}]")
    ]
    low, high = summary["success_after_interval"]
    rows.append(("held-out success after", f"{summary['success_after']:.1%}  [{low:.1%}, {high:.1%}]"))
    for name, key in (("before", "before"), ("after", "after")):
        r = summary["novel_family"][key]
        rows.append((f"never trained family {name}", f"{r['rate']:.1%}  [{r['low']:.1%}, {r['high']:.1%}]"))
    rows += [
        (name, f"{summary[key]:,}")
        for name, key in (
            ("runs", "runs"),
            ("events", "events"),
            ("model calls", "model_calls"),
            ("runs lost", "runs_lost"),
            ("runs failed", "runs_failed"),
            ("events lost", "events_lost"),
            ("model calls repeated", "model_calls_repeated"),
            ("effects repeated", "effects_repeated"),
            ("replays verified", "replays_verified"),
            ("replays failed", "replays_failed"),
        )
    ]
    kills = ", ".join(f"{k} {n}" for k, n in summary["kills"].items())
    rows += [("killed with SIGKILL", kills), ("seconds", f"{summary['seconds']:.0f}")]
    for row in rows:
        table.add_row(*row)
    return table
