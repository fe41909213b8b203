"""The stored form of events: envelope, append message, hash chain.

One append is one message: a MessagePack array of records. A record is an `Envelope` (an array, its last element
the body). The hash of an event is the SHA-256 of its record's stored bytes, never of a re-encoding, and each
record names the hash of the record before it in its stream: damage, loss and tampering break the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from nexactor.events.errors import IntegrityError
from nexactor.events.types import EVENT_TYPES, Event, UnknownEvent

GENESIS = b"\0" * 32
"""`prev` of the first event of a stream."""


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Metadata of one event. Fields are only ever added at the end, before nothing is removed.

    id: UUIDv7. stream: the actor's address. version: 1, 2, 3... within the stream. parent: the stream of the
    calling agent, or empty. time: Unix nanoseconds. cause: id of the event or message that led to this one.
    correlation: groups events across runs. prev: hash of the stream's previous event.
    blob: digest of the body in the blob store when the body was too large for the message (then `body` is nil).
    """

    id: str
    stream: str
    version: int
    run: str
    parent: str
    type: str
    schema: int
    time: int
    cause: str
    correlation: str
    node: str
    traceparent: str
    prev: bytes
    body: msgspec.Raw
    blob: str = ""


class Recorded(msgspec.Struct, frozen=True):
    """An event as read back from the log. `position` orders it within its shard (see cursor.py)."""

    envelope: Envelope
    event: Event
    hash: bytes
    position: int

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def version(self) -> int:
        return self.envelope.version

    @property
    def stream(self) -> str:
        return self.envelope.stream


_record_encoder = msgspec.msgpack.Encoder()
_records_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_decoders = {name: msgspec.msgpack.Decoder(cls) for name, cls in EVENT_TYPES.items()}


def encode_body(event: Event) -> bytes:
    """The MessagePack body of an event."""
    return event.body if isinstance(event, UnknownEvent) else _record_encoder.encode(event)


def encode_record(envelope: Envelope) -> bytes:
    """The stored bytes of one record; hash these, not a re-encoding."""
    return _record_encoder.encode(envelope)


def hash_record(record: bytes | memoryview | msgspec.Raw) -> bytes:
    """SHA-256 of a record's stored bytes."""
    return hashlib.sha256(record).digest()


def encode_append(records: Sequence[bytes]) -> bytes:
    """One append message: an array of records, their bytes untouched."""
    return _record_encoder.encode([msgspec.Raw(r) for r in records])


def decode_event(type_name: str, body: bytes | memoryview | msgspec.Raw) -> Event:
    """The typed body of an event; an `UnknownEvent` where this code does not know the type."""
    decoder = _decoders.get(type_name)
    if decoder is None:
        return UnknownEvent(type=type_name, body=bytes(body))
    return decoder.decode(body)


def split_append(message: bytes, where: str) -> list[tuple[Envelope, bytes]]:
    """Envelope and hash of every record of an append message, bodies still undecoded.

    `where` names the message in the IntegrityError that bytes which are not an append raise.
    """
    try:
        return [(_envelope_decoder.decode(r), hash_record(r)) for r in _records_decoder.decode(message)]
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{where} is not a stored append: {error}") from error
