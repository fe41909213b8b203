"""From events to the records of an append, and back: what every EventLog does the same way, byte for byte."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from nexactor.events.cursor import MAX_EVENTS_PER_APPEND, position
from nexactor.events.envelope import (
    GENESIS,
    Envelope,
    Recorded,
    decode_event,
    encode_append,
    encode_body,
    encode_record,
    hash_record,
    split_append,
)
from nexactor.events.errors import IntegrityError, LogError
from nexactor.events.ids import new_id, run_of
from nexactor.events.log import Filter, Meta
from nexactor.events.types import Event

BLOB_THRESHOLD = 256 << 10
"""Bytes from which an event's body goes to the blob store instead of the message."""
MAX_APPEND = (1 << 20) - 4096
"""Bytes an append message may have: a NATS message's default 1 MiB less room for its headers."""
NIL = msgspec.Raw(b"\xc0")

PutBlob = Callable[[bytes], Awaitable[str]]
GetBlob = Callable[[str], Awaitable[bytes]]


class Tip(msgspec.Struct, frozen=True):
    """The end of a stream. `sequence`: of its last message in the shard, 0 if it has none."""

    version: int = 0
    hash: bytes = GENESIS
    sequence: int = 0


class Stored(msgspec.Struct, frozen=True):
    """A message as it lies in the store: what `verify` walks over."""

    sequence: int
    stream: str
    data: bytes


class RawLog(Protocol):
    """What `verify` needs beyond EventLog: the stored messages themselves, decoded by nobody."""

    def stored(self, run: str = "") -> AsyncIterator[Stored]:
        """Every message up to now, in log order; of one run if given."""
        ...

    async def get_blob(self, digest: str) -> bytes:
        """See EventLog."""
        ...


class Sealed(msgspec.Struct, frozen=True):
    """One append, ready to be stored: the message's bytes and what they hold."""

    data: bytes
    envelopes: tuple[Envelope, ...]
    hashes: tuple[bytes, ...]
    events: tuple[Event, ...]

    def recorded(self, sequence: int) -> tuple[Recorded, ...]:
        """The events as the log gives them back, once they are stored at `sequence`."""
        return tuple(
            Recorded(envelope, event, hash, position(sequence, i))
            for i, (envelope, event, hash) in enumerate(
                zip(self.envelopes, self.events, self.hashes, strict=True)
            )
        )

    def tip(self, sequence: int) -> Tip:
        """The end of the stream after this append."""
        return Tip(self.envelopes[-1].version, self.hashes[-1], sequence)


def check_append(stream: str, events: Sequence[Event], expected_version: int) -> None:
    """Raise LogError for an append that no log takes."""
    if not events:
        raise LogError(f"an append to {stream} holds no events: nothing to store, nothing to acknowledge")
    if len(events) > MAX_EVENTS_PER_APPEND:
        raise LogError(
            f"an append to {stream} holds {len(events)} events, at most {MAX_EVENTS_PER_APPEND} fit: split the step"
        )
    if expected_version < 0:
        raise LogError(
            f"an append to {stream} expects version {expected_version}: versions start at 0 (no events yet)"
        )


async def seal(
    stream: str,
    events: Sequence[Event],
    tip: Tip,
    meta: Meta,
    put_blob: PutBlob,
    *,
    limit: int = MAX_APPEND,
    clock: Callable[[], int] = time.time_ns,
    ids: Callable[[], str] = new_id,
) -> Sealed:
    """The append message of `events` after `tip`. Bodies that do not fit are stored by `put_blob` first.

    `limit`: bytes the message may have. Raises LogError if it does not fit even so.
    """
    bodies = [encode_body(event) for event in events]
    blobs = [""] * len(bodies)
    envelope_size = (
        400 + 2 * len(stream) + sum(map(len, (meta.node, meta.parent, meta.cause, meta.correlation)))
    )
    total = sum(map(len, bodies)) + envelope_size * len(bodies)
    for i in sorted(range(len(bodies)), key=lambda i: -len(bodies[i])):
        if len(bodies[i]) < BLOB_THRESHOLD and total <= limit:
            break
        if len(bodies[i]) <= 64:
            break  # a digest would be no shorter
        total -= len(bodies[i])
        blobs[i] = await put_blob(bodies[i])
    run, now = run_of(stream), clock()
    previous = tip.hash
    envelopes: list[Envelope] = []
    hashes: list[bytes] = []
    records: list[bytes] = []
    for i, event in enumerate(events):
        envelope = Envelope(
            id=ids(),
            stream=stream,
            version=tip.version + i + 1,
            run=run,
            parent=meta.parent,
            type=type_of(event),
            schema=event.SCHEMA,
            time=now,
            cause=meta.cause,
            correlation=meta.correlation,
            node=meta.node,
            traceparent=meta.traceparent,
            prev=previous,
            body=NIL if blobs[i] else msgspec.Raw(bodies[i]),
            blob=blobs[i],
        )
        record = encode_record(envelope)
        previous = hash_record(record)
        envelopes.append(envelope)
        hashes.append(previous)
        records.append(record)
    data = encode_append(records)
    if len(data) > limit:
        raise LogError(
            f"an append of {len(events)} events to {stream} takes {len(data)} bytes, at most {limit} fit: "
            "split the step"
        )
    return Sealed(data, tuple(envelopes), tuple(hashes), tuple(events))


def type_of(event: Event) -> str:
    """The type tag an event is stored under."""
    from nexactor.events.types import UnknownEvent

    return event.type if isinstance(event, UnknownEvent) else type(event).__name__


def passes(filter: Filter, envelope: Envelope) -> bool:
    """`Filter.accepts` before the body is decoded, which is what costs."""
    return (
        (not filter.run or envelope.run == filter.run)
        and (not filter.kinds or envelope.stream.split("/", 1)[0] in filter.kinds)
        and (not filter.types or envelope.type in filter.types)
    )


async def open_record(envelope: Envelope, hash: bytes, where: int, get_blob: GetBlob) -> Recorded:
    """A record with its body decoded, fetched from the blob store if it lies there. Raises IntegrityError."""
    body = await get_blob(envelope.blob) if envelope.blob else envelope.body
    try:
        event = decode_event(envelope.type, body)
    except msgspec.MsgspecError as error:
        raise IntegrityError(
            f"event {envelope.version} of {envelope.stream} ({envelope.id}) is no valid {envelope.type}: {error}"
        ) from error
    return Recorded(envelope, event, hash, where)


def check_message(stored: Stored, tip: Tip) -> list[tuple[Envelope, bytes]]:
    """The records of the message that follows `tip` in its stream; IntegrityError unless they continue the chain."""
    records = split_append(stored.data, f"message {stored.sequence} of {stored.stream}")
    version, previous = tip.version, tip.hash
    for envelope, hash in records:
        name = f"event {envelope.version} of {stored.stream} ({envelope.id}, message {stored.sequence})"
        if envelope.stream != stored.stream:
            raise IntegrityError(
                f"{name} belongs to stream {envelope.stream}: it was stored under a wrong subject"
            )
        if envelope.version != version + 1:
            raise IntegrityError(
                f"{name} follows event {version}: events are missing, doubled or out of order"
            )
        if envelope.prev != previous:
            raise IntegrityError(
                f"{name} does not continue the hash chain: it or event {version} before it was altered after it was "
                "stored; `nexactor verify` names all damage"
            )
        version, previous = envelope.version, hash
    return records


def check_blob(digest: str, data: bytes) -> bytes:
    """`data`, if its SHA-256 is `digest`; else IntegrityError."""
    found = digest_of(data)
    if found != digest:
        raise IntegrityError(
            f"blob {digest} was altered after it was stored: its bytes now have digest {found}"
        )
    return data


def digest_of(data: bytes) -> str:
    """The name of a blob: the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
