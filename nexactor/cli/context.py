"""What every command gets from the global options, and how it reaches the log."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import typer

from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.events.jetstream import JetStreamLog

T = TypeVar("T")


class Settings(msgspec.Struct, frozen=True):
    """The global options. `url` is None for the embedded broker of the folder `data`.

    `journal` is a folder for ledgers of acknowledged appends, one file a process, which an audit holds against the log.
    """

    data: Path = Path(".nexactor")
    url: str | None = None
    namespace: str = "default"
    debug: bool = False
    journal: Path | None = None

    def ledger(self, name: str) -> Path | None:
        """The ledger of this process, a new file at every start; None where none is kept."""
        if self.journal is None:
            return None
        from nexactor.events.ids import new_id

        self.journal.mkdir(parents=True, exist_ok=True)
        return self.journal / f"{name}-{new_id()[-12:]}.jsonl"


def settings_of(context: typer.Context) -> Settings:
    """The global options that stand before (or after) the command."""
    settings = context.find_object(Settings)
    return settings if settings is not None else Settings()


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it and are raised once its task groups have ended."""

    async def stoppable() -> T:
        task = asyncio.current_task()
        assert task is not None
        terminated = False

        def on_sigterm() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if terminated:
                raise typer.Exit(128 + signal.SIGTERM) from None
            raise

    return asyncio.run(stoppable())


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until it ends, or is cancelled by SIGTERM or Ctrl-C: services end with exit code 0 then."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


@asynccontextmanager
async def open_log(settings: Settings, *, must_exist: bool = True) -> AsyncIterator[JetStreamLog]:
    """The event log that the global options point at.

    With `must_exist`, a data folder without a log is a ConfigError: a command that only reads should not start an
    empty broker in a folder that somebody mistyped.
    """
    from nexactor.events.broker import connect
    from nexactor.events.jetstream import JetStreamLog

    if must_exist and settings.url is None and not (settings.data / "broker").is_dir():
        raise ConfigError(
            f"there is no event log in {settings.data}: run something there first (`nexactor run`, `nexactor demo`), "
            "or point at one with --data DIR or --nats-url URL"
        )
    broker = await connect(data=settings.data, url=settings.url, namespace=settings.namespace)
    async with broker:
        log = await JetStreamLog.open(broker, journal=settings.ledger("cli"))
        try:
            yield log
        finally:
            await log.close()
