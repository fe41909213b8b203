"""How events, times and counts look in a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from nexactor.events.envelope import Recorded
from nexactor.events.types import Event, UnknownEvent

STYLES = {
    "starting": "yellow",
    "running": "yellow",
    "open": "yellow",
    "finished": "green",
    "ok": "green",
    "failed": "red",
    "cancelled": "magenta",
    "unknown": "red",
}
"""Colours of statuses."""


def one_line(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def count(number: int, thing: str) -> str:
    """`1 agent`, `2 agents`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def seconds(nanoseconds: int) -> str:
    """A duration for people: 12 ms, 3.4 s, 2 m 05 s, 1 h 02 m."""
    s = nanoseconds / 1e9
    if s < 1:
        return f"{s * 1e3:.0f} ms"
    if s < 60:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{int(s) // 60} m {int(s) % 60:02d} s"
    return f"{int(s) // 3600} h {int(s) % 3600 // 60:02d} m"


def clock(nanoseconds: int) -> str:
    """A point in time, in local time."""
    return datetime.fromtimestamp(nanoseconds / 1e9).strftime("%Y-%m-%d %H:%M:%S")


def iso(nanoseconds: int) -> str:
    """A point in time as JSON has it: ISO 8601, UTC, microseconds."""
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="microseconds")


def shortest_prefixes(ids: Iterable[str], least: int = 8) -> dict[str, str]:
    """For every id the shortest start that no other id shares, at least `least` characters."""
    ordered = sorted(ids)
    short: dict[str, str] = {}
    for i, id in enumerate(ordered):
        need = least
        for other in ordered[max(i - 1, 0) : i] + ordered[i + 1 : i + 2]:
            common = next((n for n, (a, b) in enumerate(zip(id, other, strict=False)) if a != b), len(other))
            need = max(need, common + 1)
        short[id] = id[:need]
    return short


def to_json(value: Any) -> str:
    """A value on one line of JSON."""
    return msgspec.json.encode(value).decode()


def event_json(recorded: Recorded) -> dict[str, Any]:
    """An event as JSON values; `cursor` is the log position after it, bytes are base64."""
    e = recorded.envelope
    event = recorded.event
    body: Any
    if isinstance(event, UnknownEvent):
        body = msgspec.to_builtins(msgspec.msgpack.decode(event.body), str_keys=True)
    else:
        body = msgspec.to_builtins(event, str_keys=True)
    return {
        "cursor": str(recorded.position),
        "id": e.id,
        "run": e.run,
        "stream": e.stream,
        "version": e.version,
        "type": e.type,
        "time": iso(e.time),
        "node": e.node,
        "parent": e.parent,
        "cause": e.cause,
        "hash": recorded.hash.hex(),
        "body": body,
    }


_TELLING = (
    "task", "name", "model", "error", "status", "result", "reward", "message", "arguments", "input", "reason",
    "node", "version", "step", "key", "value", "question", "kind", "content", "text", "policy_version", "finish_reason",
)  # fmt: skip
"""Fields that say what an event is about, the most telling first."""


def describe(event: Event) -> str:
    """The gist of an event, `field=value`, for one line of a terminal (cut it to the width there is)."""
    values = msgspec.structs.asdict(event)
    parts = []
    for name in _TELLING:
        value = values.get(name)
        if name == "message" and value is not None:
            calls = ", ".join(f"{c.name}({c.arguments})" for c in value.tool_calls)
            value = " ".join(filter(None, (value.content, calls)))
        if value not in (None, "", {}):
            parts.append(f"{name}={one_line(str(value), 160)}")
    return " ".join(parts)
