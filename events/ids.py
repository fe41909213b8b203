"""Identifiers: time-ordered event ids, and addresses of actors.

An address is `kind/run` for the actor that a run is named after (its root agent, its annotations), and
`kind/run/name` for the run's other actors. The run is part of the address because runs are what is sharded.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
import uuid_utils

from nexactor.events.errors import NexactorError

_SAFE = re.compile(r"[^A-Za-z0-9_-]")
_ADDRESS = re.compile(r"^[^/\s]+/[^/\s]+(/\S+)?$")


def new_id() -> str:
    """A UUIDv7 in its usual text form: sortable by creation time (RFC 9562, section 5.7)."""
    return str(uuid_utils.uuid7())


def new_run_id() -> str:
    """A short run id that sorts by creation time: 32 hex digits of a UUIDv7."""
    return uuid_utils.uuid7().hex


def check_address(address: str) -> str:
    """Return `address` unchanged, or raise NexactorError if it is not `kind/run[/name]`."""
    if not _ADDRESS.match(address):
        raise NexactorError(f"{address!r} is not an actor address: write kind/run or kind/run/name")
    return address


def kind_of(address: str) -> str:
    """The kind of an address: `agent/r1/worker` -> `agent`."""
    return address.split("/", 1)[0]


def run_of(address: str) -> str:
    """The run of an address: `agent/r1/worker` -> `r1`."""
    return address.split("/", 2)[1]


def escape(token: str) -> str:
    """`token` as one NATS subject token: bytes outside [A-Za-z0-9_-] become `%XX`, empty becomes `%`."""
    return _SAFE.sub(lambda m: "".join(f"%{b:02X}" for b in m.group().encode()), token) or "%"


def unescape(token: str) -> str:
    """The inverse of `escape`."""
    if token == "%":
        return ""
    return re.sub(r"(?:%[0-9A-F]{2})+", lambda m: bytes.fromhex(m.group().replace("%", "")).decode(), token)


def digest(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a msgspec-encodable value (keys sorted)."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
