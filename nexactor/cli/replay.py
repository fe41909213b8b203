"""`nexactor replay RUN`: decide everything again from the events alone, and compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import to_json
from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.replay import ReplayReport


def replay(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="A run's id, a unique start of it, or `last`.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Every run of the log.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Exit with code 1 unless everything is as it was decided.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Replay runs without model, tools or network: re-render every prompt, re-decide every step.

    Reports the first divergence with both sides. Hash chains and blob digests are checked on the way.
    """
    if bool(run) == every:
        raise ConfigError("say which run to replay, or --all")
    console = Console(stderr=json, soft_wrap=True, highlight=False)
    reports = run_async(_replay(context, run, console))
    failed = [r for r in reports if not r.ok]
    if json:
        typer.echo(
            to_json(
                {
                    "verified": len(reports) - len(failed),
                    "failed": len(failed),
                    "events": sum(r.events for r in reports),
                    "prompts": sum(r.prompts for r in reports),
                    "divergences": [
                        {"run": r.run, **msgspec.to_builtins(r.divergence)} for r in failed if r.divergence
                    ],
                }
            )
        )
    else:
        for report in failed:
            console.print(f"run {report.run} diverges at {report.divergence}", style="red", markup=False)
        total, prompts = sum(r.events for r in reports), sum(r.prompts for r in reports)
        console.print(
            f"{len(reports) - len(failed)} of {len(reports)} runs replay exactly: {total} events, {prompts} prompts",
            style="green" if not failed else "bold red",
        )
    if failed and verify:
        raise typer.Exit(1)


async def _replay(context: typer.Context, run: str, console: Console) -> list[ReplayReport]:
    from rich.progress import Progress

    from nexactor.cli.runs import resolve_run
    from nexactor.replay import replay_run, runs_in

    async with open_log(settings_of(context)) as log:
        ids = [await resolve_run(log, run)] if run else [r async for r in runs_in(log)]
        with Progress(console=console, transient=True, disable=len(ids) < 2) as progress:
            return [await replay_run(log, id) for id in progress.track(ids, description="replaying")]
