"""The EventLog protocol: what every store of events must do. The contract tests run against each of them.

`open_log` (broker.py) gives the real one on JetStream; `MemoryLog` (memory.py) serves unit tests and simulation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from nexactor.events.cursor import Cursor
from nexactor.events.envelope import Recorded
from nexactor.events.types import Event


class Meta(msgspec.Struct, frozen=True):
    """What an appender knows beside the events: goes into their envelopes."""

    node: str = ""
    parent: str = ""
    cause: str = ""
    correlation: str = ""
    traceparent: str = ""


class Filter(msgspec.Struct, frozen=True):
    """Which events a reader wants; empty fields do not restrict."""

    run: str = ""
    kinds: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def accepts(self, recorded: Recorded) -> bool:
        """Whether an event passes."""
        e = recorded.envelope
        return (
            (not self.run or e.run == self.run)
            and (not self.kinds or e.stream.split("/", 1)[0] in self.kinds)
            and (not self.types or e.type in self.types)
        )


EVERYTHING = Filter()


@runtime_checkable
class EventLog(Protocol):
    """A durable, ordered, verifiable log of events, one stream an actor."""

    async def append(
        self, stream: str, events: Sequence[Event], *, expected_version: int, meta: Meta = Meta()
    ) -> tuple[Recorded, ...]:
        """Append one step's events, all or none, as versions expected_version+1, +2, ...

        Returns when they are durable. A lost acknowledgement is found out, not repeated.
        Raises VersionConflict if the stream is not at `expected_version`, LogUnavailable if the store
        did not answer in time (the caller must re-read the stream before it appends again).
        """
        ...

    def read(self, stream: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:
        """The events of one stream with version > `after`, up to now, in order; hashes checked (IntegrityError)."""
        ...

    def subscribe(
        self, cursor: Cursor, *, filter: Filter = EVERYTHING, follow: bool = True
    ) -> AsyncGenerator[Recorded, None]:
        """Events of all streams after `cursor`, in log order; waits for new ones unless `follow` is false.

        Without `follow` it ends at the head as it was when the call was made. Survives broker restarts.
        """
        ...

    async def version(self, stream: str) -> int:
        """The version of the stream's last event, 0 if it has none; read from the leader, never stale."""
        ...

    async def head(self) -> Cursor:
        """The position of the newest event, as a cursor."""
        ...

    async def put_blob(self, data: bytes) -> str:
        """Store bytes under their digest (idempotent); returns the SHA-256 in hex."""
        ...

    async def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob, checked against `digest`. Raises LogError if there is none."""
        ...

    async def close(self) -> None:
        """Flush and let go of the connection."""
        ...
