"""Positions in the log.

A position is the sequence number of an append message in its shard, shifted left by 10 bits, plus the index of the
event in that message: one integer that orders events and can point between two events of one append. A cursor
holds, for every shard, the position of the last event seen (0: nothing yet).
"""

from __future__ import annotations

import msgspec

from nexactor.events.errors import NexactorError

INDEX_BITS = 10
MAX_EVENTS_PER_APPEND = 1 << INDEX_BITS


def position(sequence: int, index: int) -> int:
    """The position of event `index` of the append message `sequence`."""
    return sequence << INDEX_BITS | index


def sequence_of(position: int) -> int:
    """The append message that a position lies in."""
    return position >> INDEX_BITS


class Cursor(msgspec.Struct, frozen=True):
    """How far a reader has come, one position a shard. `str(cursor)` and `Cursor.parse` are inverse."""

    positions: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.positions)

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read a cursor from its text form; `start` and the empty text mean the beginning."""
        if text in ("", "start"):
            return cls()
        try:
            positions = tuple(int(p) for p in text.split(","))
        except ValueError:
            positions = (-1,)
        if min(positions) < 0:
            raise NexactorError(f"{text!r} is not a log cursor: use one that nexactor printed, or 'start'")
        return cls(positions)

    def advanced(self, position: int, shard: int = 0) -> Cursor:
        """This cursor moved to `position` in `shard`."""
        p = list(self.positions)
        p[shard] = position
        return Cursor(tuple(p))


START = Cursor()
