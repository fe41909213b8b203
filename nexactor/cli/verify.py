"""`nexactor verify`: is what the log holds what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import to_json
from nexactor.cli.runs import resolve_run

if TYPE_CHECKING:
    from nexactor.events.verify import Report

MOST = 15
"""Problems that are printed one by one."""


def verify(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="One run only; everything without it.")] = "",
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A journal of acknowledged appends to compare with.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
) -> None:
    """Check hash chains, version sequences and blob digests; exit code 1 if anything is wrong."""

    async def check() -> Report:
        from nexactor.events.verify import verify as check_log

        async with open_log(settings_of(context)) as log:
            return await check_log(log, await resolve_run(log, run) if run else None, ledger=ledger)

    report = run_async(check())
    if json:
        typer.echo(to_json({"ok": report.ok, **msgspec.to_builtins(report)}))
    else:
        console = Console(soft_wrap=True, highlight=False)
        first, *problems = str(report).splitlines()
        console.print(first, style="green" if report.ok else "bold red")
        for line in problems[:MOST]:
            console.print(line, style="red", markup=False)
        if len(problems) > MOST:
            console.print(f"  ... {len(problems) - MOST} more; --json lists all", style="red", markup=False)
    if not report.ok:
        raise typer.Exit(1)
