"""`nexactor node`: host actors until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Annotated

import typer
from rich.console import Console

from nexactor.cli.context import run_async, settings_of
from nexactor.cli.present import to_json


def node(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Goes into the node's id.")] = "node",
    json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON line.")] = False,
) -> None:
    """Host agents: take runs from the inboxes, take over from nodes that died.

    Ends at SIGTERM or Ctrl-C; what its agents were doing goes on at other nodes, or when a node starts again.
    """
    settings = settings_of(context)

    async def host() -> None:
        from nexactor.system import System

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with System(
            data=settings.data,
            url=settings.url,
            namespace=settings.namespace,
            name=name,
            journal=settings.ledger(name),
        ) as system:
            if json:
                typer.echo(to_json({"ready": True, "node": system.node.id}))
            else:
                Console(highlight=False).print(f"node [bold]{system.node.id}[/bold] is ready; Ctrl-C ends it")
            await stop.wait()

    with contextlib.suppress(KeyboardInterrupt):
        run_async(host())
