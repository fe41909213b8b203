"""`nexactor tail`: the log as it grows."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import describe, event_json, one_line, to_json
from nexactor.cli.runs import resolve_run

COLOURS = {
    "Model": "cyan",
    "Tool": "blue",
    "SubAg": "magenta",
    "Rewar": "green",
    "Polic": "green",
    "Learn": "green",
}


def tail(
    context: typer.Context,
    run: Annotated[
        str, typer.Option(metavar="RUN", help="Only this run: its id, a unique start, or `last`.")
    ] = "",
    start: Annotated[
        str, typer.Option("--from", metavar="CURSOR", help="`start`, a cursor, or `end`: new events only.")
    ] = "end",
    follow: Annotated[bool, typer.Option(help="Wait for new events, or stop at the log's head.")] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Follow the event log live, one line an event. Ctrl-C ends it."""

    async def read() -> None:
        from nexactor.events.cursor import Cursor
        from nexactor.events.log import Filter

        given = None if start == "end" else Cursor.parse(start)
        console = Console(soft_wrap=True)
        async with open_log(settings_of(context)) as log:
            only = await resolve_run(log, run) if run else ""
            cursor = await log.head() if given is None else given
            async for recorded in log.subscribe(cursor, filter=Filter(run=only), follow=follow):
                if json:
                    typer.echo(to_json(event_json(recorded)))
                    continue
                e = recorded.envelope
                kind = e.type[:5]
                failed = e.type.endswith(("Failed", "Exceeded"))
                line = Text(datetime.fromtimestamp(e.time / 1e9).strftime("%H:%M:%S.%f")[:-3], style="dim")
                line.append(f" {e.stream}@{e.version} ")
                line.append(e.type, style="bold red" if failed else f"bold {COLOURS.get(kind, '')}".strip())
                line.append(
                    " " + one_line(describe(recorded.event), max(console.width - len(line.plain) - 1, 20))
                )
                console.print(line)

    run_async(read())
