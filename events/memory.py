"""An event log in memory, for unit tests and simulation: the same bytes and the same answers as the real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from nexactor.events.cursor import Cursor, position, sequence_of
from nexactor.events.envelope import Recorded, split_append
from nexactor.events.errors import LogError, VersionConflict
from nexactor.events.ids import check_address, new_id, run_of
from nexactor.events.log import EVERYTHING, Filter, Meta
from nexactor.events.records import (
    Stored,
    Tip,
    check_append,
    check_blob,
    check_message,
    digest_of,
    open_record,
    passes,
    seal,
)
from nexactor.events.types import Event


class MemoryLog:
    """EventLog that lives and dies with its process.

    `clock` gives Unix nanoseconds and `ids` event ids: a simulation passes its own to be repeatable.
    `messages` and `blobs` are what a broker would have on disk; tests tamper with them.
    """

    def __init__(self, *, clock: Callable[[], int] = time.time_ns, ids: Callable[[], str] = new_id) -> None:
        self.messages: list[Stored] = []
        self.blobs: dict[str, bytes] = {}
        self._clock = clock
        self._ids = ids
        self._tips: dict[str, Tip] = {}
        self._streams: dict[str, list[int]] = {}
        self._grown = asyncio.Event()

    async def append(
        self, stream: str, events: Sequence[Event], *, expected_version: int, meta: Meta = Meta()
    ) -> tuple[Recorded, ...]:
        """See EventLog."""
        check_address(stream)
        check_append(stream, events, expected_version)
        tip = self._tips.get(stream, Tip())
        if tip.version != expected_version:
            raise VersionConflict(stream, expected_version, tip.version)
        sealed = await seal(stream, events, tip, meta, self.put_blob, clock=self._clock, ids=self._ids)
        sequence = len(self.messages) + 1
        self.messages.append(Stored(sequence, stream, sealed.data))
        self._streams.setdefault(stream, []).append(sequence)
        self._tips[stream] = sealed.tip(sequence)
        self._grown.set()
        self._grown = asyncio.Event()
        return sealed.recorded(sequence)

    async def read(self, stream: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:
        """See EventLog."""
        tip = Tip()
        for sequence in list(self._streams.get(check_address(stream), ())):
            records = check_message(self.messages[sequence - 1], tip)
            for i, (envelope, hash) in enumerate(records):
                if envelope.version > after:
                    yield await open_record(envelope, hash, position(sequence, i), self.get_blob)
            tip = Tip(records[-1][0].version, records[-1][1], sequence)

    async def subscribe(
        self, cursor: Cursor, *, filter: Filter = EVERYTHING, follow: bool = True
    ) -> AsyncGenerator[Recorded, None]:
        """See EventLog."""
        seen, head = cursor.positions[0], len(self.messages)
        if sequence_of(seen) > head:
            raise LogError(
                f"the cursor {cursor} lies beyond the end of this log (message {head}): "
                "it belongs to another log; start again from 'start'"
            )
        sequence = max(sequence_of(seen), 1)
        while follow or sequence <= head:
            grown = self._grown
            while sequence <= (len(self.messages) if follow else head):
                message = self.messages[sequence - 1]
                for i, (envelope, hash) in enumerate(split_append(message.data, f"message {sequence}")):
                    here = position(sequence, i)
                    if here > seen and passes(filter, envelope):
                        yield await open_record(envelope, hash, here, self.get_blob)
                sequence += 1
            if follow:
                await grown.wait()

    async def stored(self, run: str = "") -> AsyncIterator[Stored]:
        """Every stored message up to now, in log order, of one run if given: for `verify`."""
        for message in list(self.messages):
            if not run or run_of(message.stream) == run:
                yield message

    async def version(self, stream: str) -> int:
        """See EventLog."""
        return self._tips.get(check_address(stream), Tip()).version

    async def head(self) -> Cursor:
        """See EventLog."""
        if not self.messages:
            return Cursor()
        last = self.messages[-1]
        count = len(split_append(last.data, f"message {last.sequence}"))
        return Cursor((position(last.sequence, count - 1),))

    async def put_blob(self, data: bytes) -> str:
        """See EventLog."""
        digest = digest_of(data)
        self.blobs.setdefault(digest, data)
        return digest

    async def get_blob(self, digest: str) -> bytes:
        """See EventLog."""
        if digest not in self.blobs:
            raise LogError(f"there is no blob {digest} in this log")
        return check_blob(digest, self.blobs[digest])

    async def close(self) -> None:
        """Nothing to let go of."""
