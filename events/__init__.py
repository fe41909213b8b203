"""The event log: broker, envelopes, event types, append, read, subscribe, fold, verify.

Names are imported on first use (PEP 562), so that `import nexactor` costs nothing of what it does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexactor.events.broker import Broker, broker_pid, connect
    from nexactor.events.cursor import START, Cursor
    from nexactor.events.envelope import Envelope, Recorded
    from nexactor.events.jetstream import JetStreamLog
    from nexactor.events.log import EVERYTHING, EventLog, Filter, Meta
    from nexactor.events.memory import MemoryLog
    from nexactor.events.types import Event

_HOME = {
    "Broker": "broker",
    "Cursor": "cursor",
    "EVERYTHING": "log",
    "Envelope": "envelope",
    "Event": "types",
    "EventLog": "log",
    "Filter": "log",
    "JetStreamLog": "jetstream",
    "MemoryLog": "memory",
    "Meta": "log",
    "Recorded": "envelope",
    "START": "cursor",
    "broker_pid": "broker",
    "connect": "broker",
}

__all__ = [
    "EVERYTHING",
    "START",
    "Broker",
    "Cursor",
    "Envelope",
    "Event",
    "EventLog",
    "Filter",
    "JetStreamLog",
    "MemoryLog",
    "Meta",
    "Recorded",
    "broker_pid",
    "connect",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
