"""Which policy to serve: the newest one that the log says was published and that is there, whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from nexactor.events.cursor import START, Cursor
from nexactor.events.errors import NexactorError
from nexactor.events.log import EventLog, Filter
from nexactor.events.types import PolicyPublished
from nexactor.learner.weights import folder_digest

logger = logging.getLogger(__name__)

_PUBLISHED = Filter(types=("PolicyPublished",))
_RETRY = 1.0
"""Seconds before the log is asked again after it failed."""


async def usable(published: PolicyPublished) -> bool:
    """Whether the published folder is there with the content that was published; says so if not."""
    try:
        found = await asyncio.to_thread(folder_digest, Path(published.path))
    except OSError as error:
        logger.warning("policy %s is not served: %s", published.version, error)
        return False
    if found != published.digest:
        logger.warning(
            "policy %s at %s is not what was published: not served", published.version, published.path
        )
    return found == published.digest


async def newest(log: EventLog) -> PolicyPublished | None:
    """The newest usable policy in the log, None if there is none."""
    found, _ = await _so_far(log, START)
    for published in reversed(found):
        if await usable(published):
            return published
    return None


async def follow(log: EventLog, serve: Callable[[PolicyPublished], Awaitable[None]]) -> None:
    """Call `serve` with the newest usable policy, and with each newer one as it is published, for ever.

    Versions that come while one is being loaded are passed over, but for the last. A version that cannot be served
    is reported and left out. Log failures are waited out.
    """
    waiting: asyncio.Queue[PolicyPublished] = asyncio.Queue()

    async def watch() -> None:
        cursor = START
        while True:
            try:
                found, cursor = await _so_far(log, cursor)
                for published in found:
                    waiting.put_nowait(published)
                async for recorded in log.subscribe(cursor, filter=_PUBLISHED):
                    cursor = cursor.advanced(recorded.position)
                    if isinstance(recorded.event, PolicyPublished):
                        waiting.put_nowait(recorded.event)
                logger.warning("the log ended its subscription to published policies; subscribing again")
            except NexactorError as error:
                logger.warning("published policies cannot be read now (%s); trying again", error)
            await asyncio.sleep(_RETRY)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        while True:
            batch = [await waiting.get()]
            while not waiting.empty():
                batch.append(waiting.get_nowait())
            for published in reversed(batch):
                try:
                    if await usable(published):
                        await serve(published)
                        break
                except (NexactorError, OSError) as error:
                    logger.warning("policy %s cannot be served: %s", published.version, error)


async def _so_far(log: EventLog, cursor: Cursor) -> tuple[list[PolicyPublished], Cursor]:
    """What was published after `cursor`, oldest first, and the cursor behind it."""
    found = []
    async for recorded in log.subscribe(cursor, filter=_PUBLISHED, follow=False):
        cursor = cursor.advanced(recorded.position)
        if isinstance(recorded.event, PolicyPublished):
            found.append(recorded.event)
    return found, cursor
