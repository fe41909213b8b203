"""The event log: broker, envelopes, event types, append, read, subscribe, fold, verify.

Names are imported on first use (PEP 562), so that `import nexactor` costs nothing of what it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexactor.events.lazy import lazy_exports

if TYPE_CHECKING:
    from nexactor.events.broker import Broker as Broker
    from nexactor.events.broker import broker_pid as broker_pid
    from nexactor.events.broker import connect as connect
    from nexactor.events.cursor import START as START
    from nexactor.events.cursor import Cursor as Cursor
    from nexactor.events.envelope import Envelope as Envelope
    from nexactor.events.envelope import Recorded as Recorded
    from nexactor.events.jetstream import JetStreamLog as JetStreamLog
    from nexactor.events.log import EVERYTHING as EVERYTHING
    from nexactor.events.log import EventLog as EventLog
    from nexactor.events.log import Filter as Filter
    from nexactor.events.log import Meta as Meta
    from nexactor.events.memory import MemoryLog as MemoryLog
    from nexactor.events.types import Event as Event

_EXPORTS = {
    "EVERYTHING": "nexactor.events.log",
    "START": "nexactor.events.cursor",
    "Broker": "nexactor.events.broker",
    "Cursor": "nexactor.events.cursor",
    "Envelope": "nexactor.events.envelope",
    "Event": "nexactor.events.types",
    "EventLog": "nexactor.events.log",
    "Filter": "nexactor.events.log",
    "JetStreamLog": "nexactor.events.jetstream",
    "MemoryLog": "nexactor.events.memory",
    "Meta": "nexactor.events.log",
    "Recorded": "nexactor.events.envelope",
    "broker_pid": "nexactor.events.broker",
    "connect": "nexactor.events.broker",
}
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
