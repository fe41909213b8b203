"""Folding one stream, and projections that stop and go on."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from nexactor.events.cursor import START
from nexactor.events.envelope import Recorded
from nexactor.events.fold import Projection, fold
from nexactor.events.log import EventLog, Filter
from nexactor.events.types import Event, TimerFired


def fired(*names: str) -> list[Event]:
    return [TimerFired(timer=name) for name in names]


def joined(state: str, recorded: Recorded) -> str:
    assert isinstance(recorded.event, TimerFired)
    return state + recorded.event.timer


async def test_a_fold_gives_the_state_and_the_version_it_is_at(log: EventLog) -> None:
    await log.append("agent/r1", fired("a", "b"), expected_version=0)
    await log.append("agent/r2", fired("x"), expected_version=0)
    await log.append("agent/r1", fired("c"), expected_version=2)
    assert await fold(log, "agent/r1", "", joined) == ("abc", 3)
    assert await fold(log, "agent/r1", "ab", joined, after=2) == ("abc", 3)
    assert await fold(log, "agent/r9", "", joined) == ("", 0)


async def test_a_projection_goes_on_from_its_saved_state_and_cursor(log: EventLog) -> None:
    await log.append("agent/r1", fired("a", "b"), expected_version=0)
    early = Projection("", joined)
    assert await early.catch_up(log) == "ab"
    await log.append("agent/r2", fired("c"), expected_version=0)
    late = Projection(early.state, joined, cursor=early.cursor)
    assert await late.catch_up(log) == "abc"
    assert await late.catch_up(log) == "abc"


async def test_a_projection_does_not_read_again_what_its_filter_left_out(log: EventLog) -> None:
    await log.append("agent/r1", fired("a"), expected_version=0)
    await log.append("agent/r2", fired("b"), expected_version=0)
    projection = Projection("", joined, filter=Filter(run="r1"))
    assert await projection.catch_up(log) == "a"
    assert projection.cursor == await log.head()


async def test_an_event_is_never_folded_twice(log: EventLog) -> None:
    (recorded,) = await log.append("agent/r1", fired("a"), expected_version=0)
    projection = Projection("", joined)
    assert projection.apply(recorded)
    assert not projection.apply(recorded)
    assert projection.state == "a"


async def test_a_projection_follows_the_live_log(log: EventLog) -> None:
    projection = Projection("", joined, cursor=START)
    async with asyncio.timeout(10), aclosing(projection.follow(log)) as events:  # type: ignore[type-var]
        for i, name in enumerate("abc"):
            await log.append("agent/r1", fired(name), expected_version=i)
            await anext(events)
            assert projection.state == "abc"[: i + 1]
