"""What every EventLog must do; each test runs against each implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import cast

import msgspec
import pytest

from nexactor.events.cursor import START, Cursor, sequence_of
from nexactor.events.envelope import GENESIS, Recorded
from nexactor.events.errors import LogError, NexactorError, VersionConflict
from nexactor.events.log import EventLog, Filter, Meta
from nexactor.events.types import AgentFinished, RewardAssigned, TimerFired, UnknownEvent

A, B = "agent/r1", "agent/r1/worker-1"


def fired(*names: str) -> list[TimerFired]:
    return [TimerFired(timer=name) for name in names]


def names(recorded: list[Recorded]) -> list[str]:
    return [cast(TimerFired, r.event).timer for r in recorded]


async def everything(events: AsyncIterator[Recorded]) -> list[Recorded]:
    return [r async for r in events]


async def first(events: AsyncIterator[Recorded], count: int) -> list[Recorded]:
    found: list[Recorded] = []
    async with asyncio.timeout(10), aclosing(events):  # type: ignore[type-var]
        async for recorded in events:
            found.append(recorded)
            if len(found) == count:
                break
    return found


async def test_is_an_event_log(log: EventLog) -> None:
    assert isinstance(log, EventLog)


async def test_an_append_numbers_its_events_from_the_expected_version(log: EventLog) -> None:
    assert [r.version for r in await log.append(A, fired("a", "b"), expected_version=0)] == [1, 2]
    assert [r.version for r in await log.append(A, fired("c"), expected_version=2)] == [3]
    assert await log.version(A) == 3
    assert await log.version(B) == 0


async def test_what_append_returns_is_what_read_gives_back(log: EventLog) -> None:
    meta = Meta(node="n1", parent="agent/r0", cause="c", correlation="k", traceparent="00-1-2-01")
    written = await log.append(B, fired("a", "b"), expected_version=0, meta=meta)
    assert await everything(log.read(B)) == list(written)
    assert await everything(log.subscribe(START, follow=False)) == list(written)
    envelope = written[0].envelope
    assert (envelope.stream, envelope.run, envelope.type, envelope.schema) == (B, "r1", "TimerFired", 1)
    assert (envelope.node, envelope.parent, envelope.cause) == ("n1", "agent/r0", "c")
    assert (envelope.correlation, envelope.traceparent) == ("k", "00-1-2-01")


async def test_each_event_names_the_hash_of_the_one_before_it_in_its_stream(log: EventLog) -> None:
    await log.append(A, fired("a", "b"), expected_version=0)
    await log.append(B, fired("x"), expected_version=0)
    await log.append(A, fired("c"), expected_version=2)
    events = await everything(log.read(A))
    assert [r.envelope.prev for r in events] == [GENESIS, events[0].hash, events[1].hash]


@pytest.mark.parametrize("expected", [0, 1, 3])
async def test_a_wrong_expected_version_is_a_conflict_and_stores_nothing(
    log: EventLog, expected: int
) -> None:
    await log.append(A, fired("a", "b"), expected_version=0)
    with pytest.raises(VersionConflict) as caught:
        await log.append(A, fired("c"), expected_version=expected)
    assert (caught.value.stream, caught.value.expected, caught.value.actual) == (A, expected, 2)
    assert names(await everything(log.read(A))) == ["a", "b"]
    await log.append(A, fired("c"), expected_version=2)


async def test_of_concurrent_appends_at_one_version_exactly_one_wins(log: EventLog) -> None:
    results = await asyncio.gather(
        *(log.append(A, fired(str(i)), expected_version=0) for i in range(8)), return_exceptions=True
    )
    assert sum(isinstance(r, tuple) for r in results) == 1
    assert sum(isinstance(r, VersionConflict) for r in results) == 7
    assert await log.version(A) == 1


async def test_read_starts_after_a_version_also_inside_an_append(log: EventLog) -> None:
    await log.append(A, fired("a", "b", "c"), expected_version=0)
    await log.append(A, fired("d"), expected_version=3)
    assert names(await everything(log.read(A, after=1))) == ["b", "c", "d"]
    assert names(await everything(log.read(A, after=3))) == ["d"]
    assert names(await everything(log.read(A, after=4))) == []
    assert names(await everything(log.read(A, after=9))) == []


async def test_a_long_stream_reads_in_order(log: EventLog) -> None:
    for i in range(300):
        await log.append(A, fired(str(i)), expected_version=i)
    assert names(await everything(log.read(A))) == [str(i) for i in range(300)]


async def test_an_unwritten_stream_is_empty(log: EventLog) -> None:
    assert await everything(log.read(A)) == []
    assert await everything(log.subscribe(START, follow=False)) == []
    assert await log.head() == START


async def test_every_position_is_a_place_to_go_on_from(log: EventLog) -> None:
    await log.append(A, fired("a", "b", "c"), expected_version=0)
    await log.append(B, fired("d"), expected_version=0)
    await log.append(A, fired("e", "f"), expected_version=3)
    events = await everything(log.subscribe(START, follow=False))
    assert names(events) == list("abcdef")
    assert [r.position for r in events] == sorted({r.position for r in events})
    for i, recorded in enumerate(events):
        rest = await everything(log.subscribe(Cursor((recorded.position,)), follow=False))
        assert rest == events[i + 1 :]
    assert await log.head() == Cursor((events[-1].position,))


async def test_a_cursor_beyond_the_end_is_refused(log: EventLog) -> None:
    await log.append(A, fired("a"), expected_version=0)
    with pytest.raises(LogError, match="belongs to another log"):
        await everything(log.subscribe(Cursor((5 << 10,))))


async def test_subscribe_filters_by_run_kind_and_type(log: EventLog) -> None:
    await log.append("agent/r1", fired("a"), expected_version=0)
    await log.append("agent/r2", fired("b"), expected_version=0)
    reward = RewardAssigned(run="r1", reward=1.0, source="checker")
    await log.append("annotation/r1", [reward, *fired("c")], expected_version=0)
    await log.append("agent/r1/w-1", fired("d"), expected_version=0)

    async def found(filter: Filter) -> list[str]:
        events = await everything(log.subscribe(START, filter=filter, follow=False))
        return ["reward" if r.event == reward else cast(TimerFired, r.event).timer for r in events]

    assert await found(Filter(run="r1")) == ["a", "reward", "c", "d"]
    assert await found(Filter(run="r1", kinds=("agent",))) == ["a", "d"]
    assert await found(Filter(kinds=("agent",))) == ["a", "b", "d"]
    assert await found(Filter(kinds=("agent", "annotation"), run="r1")) == ["a", "reward", "c", "d"]
    assert await found(Filter(types=("RewardAssigned",))) == ["reward"]
    assert await found(Filter(run="absent")) == []


async def test_a_follower_gets_old_events_and_then_new_ones(log: EventLog) -> None:
    await log.append(A, fired("a"), expected_version=0)
    events = log.subscribe(START)
    async with asyncio.timeout(10), aclosing(events):  # type: ignore[type-var]
        assert names([await anext(events)]) == ["a"]
        waiting = asyncio.ensure_future(anext(events))
        await log.append(A, fired("b"), expected_version=1)
        assert names([await waiting]) == ["b"]


async def test_without_follow_it_ends_at_the_head_of_the_call(log: EventLog) -> None:
    await log.append(A, fired("a"), expected_version=0)
    await log.append(A, fired("b"), expected_version=1)
    seen = []
    async for recorded in log.subscribe(START, follow=False):
        seen.append(recorded)
        if len(seen) < 10:
            await log.append(A, fired("later"), expected_version=await log.version(A))
    assert names(seen) == ["a", "b"]


async def test_followers_read_at_their_own_pace(log: EventLog) -> None:
    for i in range(40):
        await log.append(A, fired(*(f"{i}-{j}" for j in range(40))), expected_version=i * 40)
    fast, slow = await asyncio.gather(first(log.subscribe(START), 1600), first(log.subscribe(START), 10))
    assert names(fast) == [f"{i}-{j}" for i in range(40) for j in range(40)]
    assert slow == fast[:10]


async def test_unknown_event_types_pass_through_untouched(log: EventLog) -> None:
    body = msgspec.msgpack.encode({"field": [1, 2, {"x": None}]})
    written = await log.append(
        A, [UnknownEvent(type="FromTheFuture", body=body), *fired("a")], expected_version=0
    )
    assert written[0].envelope.type == "FromTheFuture"
    assert await everything(log.read(A)) == list(written)
    assert await everything(log.subscribe(START, follow=False)) == list(written)


async def test_addresses_may_hold_any_character(log: EventLog) -> None:
    strange = "agent/r*1.>/wörker.*/ü>%20"
    await log.append(strange, fired("a"), expected_version=0)
    await log.append("agent/r*1", fired("b"), expected_version=0)
    assert names(await everything(log.read(strange))) == ["a"]
    found = await everything(log.subscribe(START, filter=Filter(run="r*1.>"), follow=False))
    assert [r.stream for r in found] == [strange]


async def test_something_that_is_no_address_is_refused(log: EventLog) -> None:
    with pytest.raises(NexactorError, match="not an actor address"):
        await log.append("agent", fired("a"), expected_version=0)


@pytest.mark.parametrize(("count", "message"), [(0, "holds no events"), (1025, "at most 1024")])
async def test_an_append_of_none_or_too_many_events_is_refused(
    log: EventLog, count: int, message: str
) -> None:
    with pytest.raises(LogError, match=message):
        await log.append(A, fired(*map(str, range(count))), expected_version=0)
    assert await log.version(A) == 0


async def test_the_largest_append_keeps_its_order(log: EventLog) -> None:
    await log.append(A, fired(*map(str, range(1024))), expected_version=0)
    assert names(await everything(log.read(A))) == [str(i) for i in range(1024)]
    assert sequence_of((await log.head()).positions[0]) == 1


async def test_a_body_too_large_for_a_message_goes_to_the_blob_store(log: EventLog) -> None:
    large = AgentFinished(result="x" * 3_000_000)
    written = await log.append(A, [*fired("a"), large, *fired("b")], expected_version=0)
    assert [bool(r.envelope.blob) for r in written] == [False, True, False]
    assert await everything(log.read(A)) == list(written)
    assert await everything(log.subscribe(START, follow=False)) == list(written)


async def test_many_middling_bodies_fit_because_the_largest_move_out(log: EventLog) -> None:
    events = [AgentFinished(result=chr(97 + i) * 200_000) for i in range(8)]
    written = await log.append(A, events, expected_version=0)
    assert 0 < sum(bool(r.envelope.blob) for r in written) < 8
    assert [r.event for r in await everything(log.read(A))] == events


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 2_500_001])
async def test_blobs_come_back_as_they_went_in(log: EventLog, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    digest = await log.put_blob(data)
    assert await log.put_blob(data) == digest
    assert await log.get_blob(digest) == data


async def test_a_blob_that_was_never_put_is_an_error(log: EventLog) -> None:
    with pytest.raises(LogError, match="no blob"):
        await log.get_blob("0" * 64)
