"""Folding: state from events, of one stream or of the whole log."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

from nexactor.events.cursor import START, Cursor
from nexactor.events.envelope import Recorded
from nexactor.events.log import EVERYTHING, EventLog, Filter

S = TypeVar("S")

Evolve = Callable[[S, Recorded], S]
"""The next state, from a state and an event. Pure: time and ids are the event's (`recorded.envelope`)."""


async def fold(log: EventLog, stream: str, state: S, evolve: Evolve[S], after: int = 0) -> tuple[S, int]:
    """`state` after the events of `stream` with version > `after`, and the version it is at now.

    Raises IntegrityError if the stream is damaged.
    """
    version = after
    async for recorded in log.read(stream, after=after):
        state = evolve(state, recorded)
        version = recorded.version
    return state, version


class Projection(Generic[S]):
    """A fold over the log that can stop and go on: its state, and the cursor up to which it has folded.

    Save `state` and `cursor` together, start again from both, and no event is folded twice or left out.
    """

    def __init__(
        self, state: S, evolve: Evolve[S], *, cursor: Cursor = START, filter: Filter = EVERYTHING
    ) -> None:
        self.state = state
        self.cursor = cursor
        self.filter = filter
        self._evolve = evolve

    def apply(self, recorded: Recorded) -> bool:
        """Fold one event; false, and nothing done, if it lies at or before the cursor."""
        if recorded.position <= self.cursor.positions[0]:
            return False
        self.state = self._evolve(self.state, recorded)
        self.cursor = self.cursor.advanced(recorded.position)
        return True

    async def catch_up(self, log: EventLog) -> S:
        """Fold everything up to the log's head as of now."""
        head = await log.head()
        async for recorded in log.subscribe(self.cursor, filter=self.filter, follow=False):
            self.apply(recorded)
        if head.positions[0] > self.cursor.positions[0]:
            self.cursor = head  # what the filter left out need not be read again
        return self.state

    async def follow(self, log: EventLog) -> AsyncGenerator[Recorded, None]:
        """Fold for ever; yields each event after it was folded, so that `state` already contains it."""
        events = log.subscribe(self.cursor, filter=self.filter)
        try:
            async for recorded in events:
                if self.apply(recorded):
                    yield recorded
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()
