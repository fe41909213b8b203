"""`nexactor learn run CONFIG`: train on the log as it grows."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import to_json

if TYPE_CHECKING:
    from nexactor.learner.config import LearnerConfig
    from nexactor.learner.loop import LearnerResult

app = typer.Typer(no_args_is_help=True)


@app.command(epilog="Example: nexactor learn run learner.yaml")
def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The learner's YAML file.")],
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a step, and one for the end.")
    ] = False,
) -> None:
    """Follow the log, train on its runs, publish new policies.

    Goes on where it ended, however that was. Ctrl-C (or SIGTERM) lets the step in hand finish and be saved; a second
    one ends it at once. The file's keys are those of `LearnerConfig` in learner/config.py.
    """
    from nexactor.learner.config import load_learner_config
    from nexactor.learner.train import keep_compiled

    learner = load_learner_config(config)
    keep_compiled(Path(learner.out).expanduser().absolute() / "compiled")
    console = Console(stderr=json, highlight=False, soft_wrap=True)
    result = run_async(_learn(context, learner, console, json))
    if json:
        path = None if result.path is None else str(result.path)
        typer.echo(
            to_json({"step": result.step, "reason": result.reason, "version": result.version, "path": path})
        )
        return
    why = {"max_steps": "all steps are done", "stopped": "stopped", "end_of_log": "the log has no more runs"}
    published = f"; policy [bold]{result.version}[/bold] is at {result.path}" if result.version else ""
    console.print(f"step {result.step}: {why.get(result.reason, result.reason)}{published}")


async def _learn(
    context: typer.Context, config: LearnerConfig, console: Console, json: bool
) -> LearnerResult:
    from nexactor.learner.loop import run_learner

    stop = asyncio.Event()
    main = asyncio.current_task()
    assert main is not None

    def on_signal() -> None:
        if stop.is_set():
            main.cancel()
        elif not json:
            console.print("finishing the step in hand; once more ends it at once", style="yellow")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    live = console.is_terminal and not json
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not live) as bars:
        bar = bars.add_task(f"learner/{config.name} waits for runs", total=config.max_steps or None)

        def progress(report: dict[str, Any]) -> None:
            if json:
                typer.echo(to_json(report))
            elif live:
                bars.update(bar, completed=report["step"], description=describe(report))
            else:
                console.print(f"step {report['step']}: {describe(report)}")

        # must_exist is false: a learner may be the first to start, and waits for runs.
        async with open_log(settings_of(context), must_exist=False) as log:
            return await run_learner(config, log, progress, stop)


def describe(report: dict[str, Any]) -> str:
    """A step's numbers for people."""
    reward = f", reward {report['reward']:.2f}" if "reward" in report else ""
    return (
        f"loss {report['loss']:.3f}{reward}, {report['runs']:.0f} runs, {report['tokens']:,} tokens, "
        f"{report['tokens_per_second']:.0f}/s, waited {report['waited']:.1f} s"
    )
