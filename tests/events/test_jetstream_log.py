"""What only the JetStream log has to prove: crashes, lost acknowledgements, rivals, damage on the server."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nexactor.events import broker as broker_module
from nexactor.events.broker import Broker, connect, kill_server
from nexactor.events.cursor import START, Cursor
from nexactor.events.envelope import GENESIS, Recorded
from nexactor.events.errors import IntegrityError, LogError, LogUnavailable, VersionConflict
from nexactor.events.jetstream import JetStreamLog
from nexactor.events.log import Filter, Meta
from nexactor.events.records import Tip, digest_of, seal
from nexactor.events.types import TimerFired
from nexactor.events.verify import verify

A = "agent/r1"


def fired(*names: str) -> list[TimerFired]:
    return [TimerFired(timer=name) for name in names]


async def read(log: JetStreamLog, stream: str = A) -> list[str]:
    return [r.event.timer async for r in log.read(stream)]  # type: ignore[attr-defined]


async def test_kills_of_the_server_lose_and_double_nothing(data: Path, tmp_path: Path) -> None:
    kills, writers, ledger = 12, 6, tmp_path / "ledger"
    acknowledged: list[Recorded] = []
    followed: list[Recorded] = []
    progress = asyncio.Condition()
    stop = asyncio.Event()

    async def write(log: JetStreamLog, k: int) -> None:
        version = 0
        while not stop.is_set():
            stored = await log.append(
                f"agent/r{k}", fired(f"{version}a", f"{version}b"), expected_version=version
            )
            version = stored[-1].version
            async with progress:
                acknowledged.extend(stored)
                progress.notify_all()

    async def follow(log: JetStreamLog) -> None:
        async with aclosing(log.subscribe(START)) as events:
            async for recorded in events:
                followed.append(recorded)
                if stop.is_set() and len(followed) >= len(acknowledged):
                    return

    async with await connect(data=data) as broker, await connect(data=data) as another:
        log = await JetStreamLog.open(broker, journal=ledger)
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for k in range(writers):
                tasks.create_task(write(log, k))
            follower = tasks.create_task(follow(await JetStreamLog.open(another)))
            for _ in range(kills):
                count = len(acknowledged) + 60
                async with progress:
                    await progress.wait_for(lambda count=count: len(acknowledged) >= count)
                while kill_server(data) is None:
                    await asyncio.sleep(0)
            stop.set()
            await log.append("agent/last", fired("end", "end"), expected_version=0)
        assert follower.done()
        stored = [r async for r in log.subscribe(START, follow=False)]
        assert {r.id for r in acknowledged} <= {r.id for r in stored}
        assert len({r.id for r in stored}) == len(stored) == len(acknowledged) + 2
        assert followed == stored[: len(followed)]
        report = await verify(log, ledger=ledger)
        assert report.ok, str(report)
        assert report.events == len(stored)


async def test_the_stale_one_of_two_writers_gets_a_conflict(broker: Broker) -> None:
    old, new = await JetStreamLog.open(broker), await JetStreamLog.open(broker)
    await old.append(A, fired("1"), expected_version=0)
    await new.append(A, fired("2"), expected_version=1)
    with pytest.raises(VersionConflict) as caught:
        await old.append(A, fired("never"), expected_version=1)
    assert (caught.value.expected, caught.value.actual) == (1, 2)
    await old.append(A, fired("3"), expected_version=2)
    assert await read(new) == ["1", "2", "3"]


class LosesReplies:
    """Makes a broker lose the reply to its next publishes of events, after the server has stored them."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.ask, self.left = broker._ask, count
        self.after: Any = None
        monkeypatch.setattr(broker, "_ask", self)

    async def __call__(self, subject: str, *rest: Any) -> Any:
        reply = await self.ask(subject, *rest)
        if ".ev." in subject and self.left:
            self.left -= 1
            if self.after is not None:
                await self.after()
            raise broker_module._Lost
        return reply


async def test_a_lost_acknowledgement_is_found_out_not_repeated(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await JetStreamLog.open(broker)
    losing = LosesReplies(broker, monkeypatch)
    stored = await log.append(A, fired("1", "2"), expected_version=0)
    assert losing.left == 0
    assert [r async for r in log.read(A)] == list(stored)
    await log.append(A, fired("3"), expected_version=2)
    assert await read(log) == ["1", "2", "3"]


async def test_an_append_whose_ack_was_lost_stands_even_if_another_owner_wrote_after_it(
    broker: Broker, broker_data: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await connect(data=broker_data, namespace=namespace) as another:
        log, rival = await JetStreamLog.open(broker), await JetStreamLog.open(another)
        losing = LosesReplies(broker, monkeypatch)

        async def take_over() -> None:
            await rival.append(A, fired("rival"), expected_version=1)

        losing.after = take_over
        assert [r.version for r in await log.append(A, fired("mine"), expected_version=0)] == [1]
        with pytest.raises(VersionConflict):
            await log.append(A, fired("too late"), expected_version=1)
        assert await read(log) == ["mine", "rival"]


async def test_the_journal_has_a_line_for_every_acknowledged_append(broker: Broker, tmp_path: Path) -> None:
    log = await JetStreamLog.open(broker, journal=tmp_path / "folder" / "journal")
    first = await log.append(A, fired("1", "2"), expected_version=0)
    second = await log.append("agent/r2", fired("3"), expected_version=0)
    with pytest.raises(VersionConflict):
        await log.append(A, fired("no"), expected_version=0)
    lines = [json.loads(line) for line in (tmp_path / "folder" / "journal").read_text().splitlines()]
    assert lines == [
        {"stream": A, "version": 2, "hash": first[-1].hash.hex()},
        {"stream": "agent/r2", "version": 1, "hash": second[-1].hash.hex()},
    ]
    await log.close()


async def forge(broker: Broker, tip: Tip, name: str) -> None:
    """Write an event to the stream behind the log's back."""

    async def no_blobs(data: bytes) -> str:
        raise AssertionError

    sealed = await seal(A, fired(name), tip, Meta(), no_blobs)
    reply = await broker.request(f"nx.{broker.namespace}.ev.0.r1.agent.%", sealed.data)
    assert b'"error"' not in reply.data


async def test_a_forged_event_breaks_the_chain(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    await log.append(A, fired("1"), expected_version=0)
    await forge(broker, Tip(1, GENESIS, 0), "forged")
    with pytest.raises(IntegrityError, match=r"event 2 of agent/r1 .* does not continue the hash chain"):
        await read(log)
    (problem,) = (await verify(log)).problems
    assert (problem.kind, problem.version) == ("altered", 1)


async def test_a_gap_in_a_stream_is_an_integrity_error(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    (one,) = await log.append(A, fired("1"), expected_version=0)
    await forge(broker, Tip(4, one.hash, 0), "6?")
    with pytest.raises(IntegrityError, match=r"event 5 of agent/r1 .* follows event 1"):
        await read(log)
    assert [(p.kind, p.version) for p in (await verify(log)).problems] == [("missing", v) for v in (2, 3, 4)]


async def test_a_message_that_is_no_append_is_an_integrity_error(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    await broker.request(f"nx.{broker.namespace}.ev.0.r1.agent.%", b"rubbish")
    with pytest.raises(IntegrityError, match=r"message 1 .* is not a stored append"):
        await read(log)


async def consumers(broker: Broker) -> list[str]:
    return list((await broker.api(f"CONSUMER.NAMES.NX-{broker.namespace}-events-0"))["consumers"] or [])


async def test_a_follower_goes_on_when_its_consumer_is_deleted(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    await log.append(A, fired("0"), expected_version=0)
    async with asyncio.timeout(20), aclosing(log.subscribe(START)) as events:
        for i in range(1, 4):
            assert (await anext(events)).version == i
            (consumer,) = await consumers(broker)
            await broker.api(f"CONSUMER.DELETE.NX-{broker.namespace}-events-0.{consumer}")
            await log.append(A, fired(str(i)), expected_version=i)


async def test_a_reader_that_leaves_takes_its_consumer_along(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    await log.append(A, fired("0"), expected_version=0)
    async with aclosing(log.subscribe(START)) as events:
        await anext(events)
        assert len(await consumers(broker)) == 1
    async with asyncio.timeout(10):
        while await consumers(broker):  # the server deletes it when it gets round to it
            pass


async def test_a_slow_reader_holds_only_so_many_messages(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    name = f"NX-{broker.namespace}-events-0"
    await asyncio.gather(*(log.append(f"agent/r{i}", fired(str(i)), expected_version=0) for i in range(2000)))
    async with aclosing(log.subscribe(START)) as events:
        seen = [await anext(events)]
        await broker.api("INFO")  # a round trip, so that what was sent has arrived
        (consumer,) = (await broker.api(f"CONSUMER.LIST.{name}"))["consumers"]
        assert consumer["delivered"]["consumer_seq"] <= 1024
        seen += [await anext(events) for _ in range(1999)]
    assert len({r.stream for r in seen}) == 2000


async def test_reading_falls_back_to_the_leader_when_a_replica_lags(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await JetStreamLog.open(broker)
    await log.append(A, fired("1"), expected_version=0)
    await log.append(A, fired("2"), expected_version=1)

    async def nothing_yet(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(broker, "request_many", nothing_yet)
    assert await read(log) == ["1", "2"]


async def test_an_append_that_the_server_has_no_room_for_is_an_error_with_its_reason(broker: Broker) -> None:
    config = {
        "subjects": [f"nx.{broker.namespace}.ev.0.>"],
        "discard": "new",
        "max_msgs": 1,
        "storage": "file",
    }
    name = f"NX-{broker.namespace}-events-0"
    await broker.api(f"STREAM.CREATE.{name}", {"name": name, **config})
    log = await JetStreamLog.open(broker)
    await log.append(A, fired("1"), expected_version=0)
    with pytest.raises(LogError, match="refused to store a message: maximum messages exceeded"):
        await log.append(A, fired("2"), expected_version=1)
    assert await read(log) == ["1"]


async def test_namespaces_do_not_see_each_other(broker: Broker, broker_data: Path, namespace: str) -> None:
    async with await connect(data=broker_data, namespace=f"{namespace}-2") as other:
        one, two = await JetStreamLog.open(broker), await JetStreamLog.open(other)
        await one.append(A, fired("1"), expected_version=0)
        assert await two.version(A) == 0
        assert [r async for r in two.subscribe(START, follow=False)] == []


async def test_a_run_is_read_without_the_others(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    for i in range(3):
        await log.append("agent/r1", fired(str(i)), expected_version=i)
        await log.append("agent/r10", fired("x"), expected_version=i)
    events = [r async for r in log.subscribe(START, filter=Filter(run="r1"), follow=False)]
    assert [r.version for r in events] == [1, 2, 3]
    rest = [
        r async for r in log.subscribe(Cursor((events[0].position,)), filter=Filter(run="r1"), follow=False)
    ]
    assert rest == events[1:]


async def test_a_half_stored_blob_is_not_there_until_it_is_stored_again(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    data = bytes(range(256)) * 8192
    prefix = f"nx.{broker.namespace}.blob.{digest_of(data)}"
    chunk = 512 << 10
    await broker.request(f"{prefix}.{chunk}.1", data[chunk : 2 * chunk])  # its writer died here
    with pytest.raises(LogError, match="no blob"):
        await log.get_blob(digest_of(data))
    await log.put_blob(data)
    fresh = await JetStreamLog.open(broker)
    assert await fresh.get_blob(digest_of(data)) == data


async def test_a_blob_that_a_replica_lacks_is_read_from_the_leader(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await JetStreamLog.open(broker)
    data = bytes(range(256)) * 5000
    digest = await log.put_blob(data)
    ask = broker._ask

    async def lagging(subject: str, *rest: Any) -> Any:
        return await ask(subject + "x" if "DIRECT.GET" in subject else subject, *rest)

    monkeypatch.setattr(broker, "_ask", lagging)
    fresh = await JetStreamLog.open(broker)
    assert await fresh.get_blob(digest) == data


async def test_a_follower_of_a_closed_connection_ends_with_an_error(data: Path) -> None:
    async with await connect(data=data) as broker:
        log = await JetStreamLog.open(broker)
        events = log.subscribe(START)
        waiting = asyncio.ensure_future(anext(events))
        await log.append(A, fired("1"), expected_version=0)
        await waiting
        waiting = asyncio.ensure_future(anext(events))
        await log.version(A)
    with pytest.raises(LogUnavailable, match="is closed"):
        await waiting


async def test_an_altered_blob_is_an_integrity_error(broker: Broker) -> None:
    log = await JetStreamLog.open(broker)
    digest = digest_of(b"what it was")
    await broker.request(f"nx.{broker.namespace}.blob.{digest}", b"what it is", headers={"Nx-Chunks": "1"})
    with pytest.raises(IntegrityError, match=f"blob {digest} was altered"):
        await log.get_blob(digest)
