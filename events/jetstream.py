"""The event log on NATS JetStream: one message an append, one subject a stream, the expected version on the server.

Stream `NX-<namespace>-events-0` holds `nx.<namespace>.ev.0.<run>.<kind>.<rest>`, every token escaped. The server
compares an append's expected sequence with the subject's last (`Nats-Expected-Last-Subject-Sequence`): that check
alone fences a former owner.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from nats.aio.msg import Msg

from nexactor.events.blobs import Blobs
from nexactor.events.broker import ApiError, Broker
from nexactor.events.cursor import Cursor, position, sequence_of
from nexactor.events.envelope import Recorded, split_append
from nexactor.events.errors import LogError, VersionConflict
from nexactor.events.ids import check_address, escape, unescape
from nexactor.events.log import EVERYTHING, Filter, Meta
from nexactor.events.records import (
    MAX_APPEND,
    Sealed,
    Stored,
    Tip,
    check_append,
    check_message,
    open_record,
    passes,
    seal,
)
from nexactor.events.streams import NO_MESSAGE, WRONG_LAST_SEQUENCE, Puller, ack_of, ensure_stream
from nexactor.events.types import Event

KNOWN_TIPS = 50_000
"""Streams whose end is remembered, so that their owner appends without asking first."""
_READ_BATCH = 256


class JetStreamLog:
    """EventLog on a broker. Get one from `open`."""

    def __init__(self, broker: Broker, journal: Path | None = None) -> None:
        self._broker = broker
        self._name = f"NX-{broker.namespace}-events-0"
        self._prefix = f"nx.{broker.namespace}.ev.0"
        self._limit = min(MAX_APPEND, broker.max_payload - 4096)
        self._blobs = Blobs(broker)
        self._tips: OrderedDict[str, Tip] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._journal = None if journal is None else _Journal(journal)

    @classmethod
    async def open(cls, broker: Broker, *, journal: Path | None = None) -> JetStreamLog:
        """The log of the broker's namespace, its streams created if missing.

        `journal`: a file to which every acknowledged append adds the JSON line
        `{"stream", "version", "hash"}` of its last event, a ledger independent of the broker.
        """
        log = cls(broker, journal)
        config = {
            "subjects": [f"{log._prefix}.>"],
            "discard": "new",
            "deny_delete": True,
            "allow_direct": True,
            "allow_atomic": True,
        }
        await ensure_stream(broker, log._name, config)
        await log._blobs.create()
        return log

    async def append(
        self, stream: str, events: Sequence[Event], *, expected_version: int, meta: Meta = Meta()
    ) -> tuple[Recorded, ...]:
        """See EventLog."""
        check_address(stream)
        check_append(stream, events, expected_version)
        async with self._lock(stream):
            tip = self._tips.get(stream)
            if tip is None or tip.version != expected_version:
                tip = await self._tip(stream)
                if tip.version != expected_version:
                    raise VersionConflict(stream, expected_version, tip.version)
            sealed = await seal(stream, events, tip, meta, self._blobs.put, limit=self._limit)
            self._tips.pop(stream, None)  # unknown until acknowledged
            sequence = await self._publish(stream, sealed, tip)
            self._know(stream, sealed.tip(sequence))
        if self._journal is not None:
            self._journal.add(stream, sealed.envelopes[-1].version, sealed.hashes[-1])
        return sealed.recorded(sequence)

    async def read(self, stream: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:
        """See EventLog."""
        check_address(stream)
        end = await self._tip(stream)
        known = self._tips.get(stream)
        tip = known if known is not None and known.version == after else Tip()
        while tip.sequence < end.sequence:
            for stored in await self._subject_messages(stream, tip.sequence + 1, end.sequence):
                records = check_message(stored, tip)
                for i, (envelope, hash) in enumerate(records):
                    if envelope.version > after:
                        yield await open_record(envelope, hash, position(stored.sequence, i), self._blobs.get)
                tip = Tip(records[-1][0].version, records[-1][1], stored.sequence)
        known = self._tips.get(stream)
        if known is None or known.sequence < tip.sequence:
            self._know(stream, tip)

    async def subscribe(
        self, cursor: Cursor, *, filter: Filter = EVERYTHING, follow: bool = True
    ) -> AsyncGenerator[Recorded, None]:
        """See EventLog."""
        seen = cursor.positions[0]
        head = await self._last_sequence()
        if sequence_of(seen) > head:
            raise LogError(
                f"the cursor {cursor} lies beyond the end of this log (message {head}): it belongs to another log or "
                "namespace, or the log's folder was replaced; start again from 'start'"
            )
        puller = Puller(self._broker, self._name, sequence_of(seen), self._subjects(filter))
        async with aclosing(puller.messages(follow=follow)) as messages:
            async for sequence, message in messages:
                if not follow and sequence > head:
                    return
                for i, (envelope, hash) in enumerate(split_append(message.data, f"message {sequence}")):
                    here = position(sequence, i)
                    if here > seen and passes(filter, envelope):
                        yield await open_record(envelope, hash, here, self._blobs.get)
                if not follow and sequence == head:
                    return

    async def stored(self, run: str = "") -> AsyncIterator[Stored]:
        """Every stored message up to now, in log order, of one run if given: for `verify`."""
        head = await self._last_sequence()
        puller = Puller(self._broker, self._name, 1, self._subjects(Filter(run=run)))
        async with aclosing(puller.messages(follow=False)) as messages:
            async for sequence, message in messages:
                if sequence > head:
                    return
                yield Stored(sequence, self._stream_of(message.subject), message.data)

    async def version(self, stream: str) -> int:
        """See EventLog."""
        return (await self._tip(check_address(stream))).version

    async def head(self) -> Cursor:
        """See EventLog."""
        sequence = await self._last_sequence()
        if sequence == 0:
            return Cursor()
        stored = await self._message({"seq": sequence})
        count = 1 if stored is None else len(split_append(stored.data, f"message {sequence}"))
        return Cursor((position(sequence, count - 1),))

    async def put_blob(self, data: bytes) -> str:
        """See EventLog."""
        return await self._blobs.put(data)

    async def get_blob(self, digest: str) -> bytes:
        """See EventLog."""
        return await self._blobs.get(digest)

    async def close(self) -> None:
        """Let go of the journal; the broker belongs to whoever connected it."""
        if self._journal is not None:
            self._journal.close()

    async def _publish(self, stream: str, sealed: Sealed, tip: Tip) -> int:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(tip.sequence)}
        subject = self._subject(stream)
        ack = await ack_of(self._broker, subject, sealed.data, headers, accept=(WRONG_LAST_SEQUENCE,))
        if ack.code == 0:
            return ack.sequence
        # Either someone else was first, or an earlier attempt of ours was stored and only its acknowledgement lost.
        # What follows the expected message tells: event ids are unique, so equal bytes are ours.
        following = await self._message({"seq": tip.sequence + 1, "next_by_subj": subject})
        if following is not None and following.data == sealed.data:
            return following.sequence
        raise VersionConflict(stream, tip.version, (await self._tip(stream)).version)

    async def _tip(self, stream: str) -> Tip:
        """The stream's end as its leader has it; never stale."""
        stored = await self._message({"last_by_subj": self._subject(stream)})
        if stored is None:
            return Tip()
        envelope, hash = split_append(stored.data, f"message {stored.sequence} of {stream}")[-1]
        return Tip(envelope.version, hash, stored.sequence)

    async def _message(self, which: dict[str, Any]) -> Stored | None:
        try:
            answer = await self._broker.api(f"STREAM.MSG.GET.{self._name}", which)
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return None
            raise
        message = answer["message"]
        return Stored(
            int(message["seq"]),
            self._stream_of(message["subject"]),
            base64.b64decode(message.get("data", "")),
        )

    async def _subject_messages(self, stream: str, start: int, end: int) -> list[Stored]:
        """The stream's next messages with sequence in start..end, at least one.

        A batched direct get is quick, but a replica that lags may answer it: then the leader is asked.
        """
        subject = self._subject(stream)
        request = {"seq": start, "next_by_subj": subject, "batch": _READ_BATCH, "max_bytes": 8 << 20}
        replies = await self._broker.request_many(
            f"$JS.API.DIRECT.GET.{self._name}", json.dumps(request).encode(), ends=_ends_batch
        )
        found = [
            Stored(int(m.headers["Nats-Sequence"]), stream, m.data) for m in replies if m.headers is not None
        ]
        found = [stored for stored in found if stored.sequence <= end]
        if not found:
            stored = await self._message({"seq": start, "next_by_subj": subject})
            if stored is None or stored.sequence > end:
                raise LogError(f"messages of {stream} were removed from the log while it was read")
            found = [stored]
        return found

    async def _last_sequence(self) -> int:
        info = await self._broker.api(f"STREAM.INFO.{self._name}")
        return int(info["state"]["last_seq"])

    def _know(self, stream: str, tip: Tip) -> None:
        self._tips[stream] = tip
        self._tips.move_to_end(stream)
        if len(self._tips) > KNOWN_TIPS:
            self._tips.popitem(last=False)

    def _lock(self, stream: str) -> asyncio.Lock:
        lock = self._locks.get(stream)
        if lock is None:
            lock = self._locks[stream] = asyncio.Lock()
        return lock

    def _subject(self, stream: str) -> str:
        kind, run, *rest = stream.split("/", 2)
        return f"{self._prefix}.{escape(run)}.{escape(kind)}.{escape(rest[0] if rest else '')}"

    def _stream_of(self, subject: str) -> str:
        run, kind, rest = (unescape(token) for token in subject.split(".")[-3:])
        return f"{kind}/{run}/{rest}" if rest else f"{kind}/{run}"

    def _subjects(self, filter: Filter) -> list[str]:
        # Broad filters are slow on the server where there are many subjects: those are applied here.
        if not filter.run:
            return []
        run = escape(filter.run)
        return [f"{self._prefix}.{run}.{escape(kind)}.*" for kind in filter.kinds] or [
            f"{self._prefix}.{run}.>"
        ]


def _ends_batch(message: Msg) -> bool:
    return message.headers is not None and "Status" in message.headers


class _Journal:
    """One JSON line an acknowledged append, written by a single call so that processes may share the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def add(self, stream: str, version: int, hash: bytes) -> None:
        os.write(
            self._file,
            msgspec.json.encode({"stream": stream, "version": version, "hash": hash.hex()}) + b"\n",
        )

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
