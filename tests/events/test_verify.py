"""Verification names what is wrong with a log that was tampered with."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from nexactor.events.cursor import START
from nexactor.events.envelope import encode_append, encode_record, split_append
from nexactor.events.errors import ConfigError, IntegrityError
from nexactor.events.memory import MemoryLog
from nexactor.events.records import Stored
from nexactor.events.types import AgentFinished, TimerFired
from nexactor.events.verify import Problem, Report, verify

A, B = "agent/r1", "agent/r2"


@pytest.fixture
async def log() -> MemoryLog:
    """Six messages: A1 A2 | B1 | A3 | A4 | B2 | A5 (its body a blob)."""
    log = MemoryLog()
    await log.append(A, [TimerFired(timer="1"), TimerFired(timer="2")], expected_version=0)
    await log.append(B, [TimerFired(timer="1")], expected_version=0)
    await log.append(A, [TimerFired(timer="3")], expected_version=2)
    await log.append(A, [TimerFired(timer="4")], expected_version=3)
    await log.append(B, [TimerFired(timer="2")], expected_version=1)
    await log.append(A, [AgentFinished(result="x" * 300_000)], expected_version=4)
    return log


def named(report: Report) -> list[tuple[str, str, int]]:
    return [(p.kind, p.stream, p.version) for p in report.problems]


def alter(log: MemoryLog, sequence: int, old: bytes, new: bytes) -> None:
    message = log.messages[sequence - 1]
    assert old in message.data
    log.messages[sequence - 1] = Stored(sequence, message.stream, message.data.replace(old, new, 1))


def remove(log: MemoryLog, *sequences: int) -> None:
    log.messages = [m for m in log.messages if m.sequence not in sequences]


def ledger(path: Path, log: MemoryLog) -> Path:
    with path.open("w") as file:
        for message in log.messages:
            envelope, hash = split_append(message.data, "")[-1]
            line = {"stream": message.stream, "version": envelope.version, "hash": hash.hex()}
            file.write(json.dumps(line) + "\n")
    return path


async def test_a_whole_log_verifies(log: MemoryLog, tmp_path: Path) -> None:
    report = await verify(log, ledger=ledger(tmp_path / "ledger", log))
    assert report == Report(messages=6, events=7, streams=2, blobs=1, ledger=6, problems=())
    assert report.ok
    assert "7 events in 2 streams" in str(report)


async def test_one_run_can_be_verified_alone(log: MemoryLog) -> None:
    alter(log, 3, b"\xa13", b"\xa19")
    assert (await verify(log, "r2")).ok
    assert named(await verify(log, "r1")) == [("altered", A, 3)]


async def test_an_altered_event_is_named_with_its_id(log: MemoryLog) -> None:
    ((envelope, _),) = split_append(log.messages[2].data, "")
    alter(log, 3, b"\xa13", b"\xa19")
    (problem,) = (await verify(log)).problems
    assert (problem.kind, problem.version, problem.event) == ("altered", 3, envelope.id)
    assert envelope.id in str(problem)


async def test_an_altered_event_stops_a_reader(log: MemoryLog) -> None:
    alter(log, 3, b"\xa13", b"\xa19")
    with pytest.raises(IntegrityError, match=r"event 4 of agent/r1 .* does not continue the hash chain"):
        _ = [r async for r in log.read(A)]


async def test_an_event_altered_within_its_append_is_found(log: MemoryLog) -> None:
    alter(log, 1, b"\xa11", b"\xa19")
    assert named(await verify(log)) == [("altered", A, 1)]


async def test_missing_events_are_each_named(log: MemoryLog) -> None:
    remove(log, 3, 4)
    assert named(await verify(log)) == [("missing", A, 3), ("missing", A, 4)]


async def test_reordered_events_are_named(log: MemoryLog) -> None:
    log.messages[2], log.messages[3] = log.messages[3], log.messages[2]
    assert named(await verify(log)) == [("reordered", A, 3)]


async def test_a_repeated_event_is_named(log: MemoryLog) -> None:
    log.messages.append(Stored(7, B, log.messages[4].data))
    assert named(await verify(log)) == [("repeated", B, 2)]


async def test_an_event_under_the_wrong_stream_is_named(log: MemoryLog) -> None:
    log.messages[4] = Stored(5, "agent/r3", log.messages[4].data)
    assert named(await verify(log)) == [("misplaced", "agent/r3", 2)]


async def test_a_message_that_is_no_append_is_named(log: MemoryLog) -> None:
    log.messages[3] = Stored(4, A, b"rubbish")
    assert named(await verify(log)) == [("unreadable", A, 0), ("missing", A, 4)]


async def test_a_body_that_does_not_decode_is_named(log: MemoryLog) -> None:
    ((envelope, _),) = split_append(log.messages[4].data, "")
    body = msgspec.Raw(msgspec.msgpack.encode({"timer": 7}))
    record = encode_record(msgspec.structs.replace(envelope, body=body))
    log.messages[4] = Stored(5, B, encode_append([record]))
    assert named(await verify(log)) == [("unreadable", B, 2)]
    with pytest.raises(IntegrityError, match="no valid TimerFired"):
        _ = [r async for r in log.subscribe(START, follow=False)]


@pytest.mark.parametrize("damage", ["altered", "lost"])
async def test_a_damaged_blob_is_named_by_its_event(log: MemoryLog, damage: str) -> None:
    (digest,) = log.blobs
    if damage == "lost":
        del log.blobs[digest]
    else:
        log.blobs[digest] = log.blobs[digest][:-1] + b"y"
    assert named(await verify(log)) == [("blob", A, 5)]


async def test_a_log_cut_off_at_its_end_is_found_by_the_ledger(log: MemoryLog, tmp_path: Path) -> None:
    kept = ledger(tmp_path / "ledger", log)
    remove(log, 5, 6)
    assert (await verify(log)).ok
    report = await verify(log, ledger=kept)
    assert sorted(named(report)) == [("missing", A, 5), ("missing", B, 2)]


async def test_a_log_written_anew_with_a_valid_chain_is_found_by_the_ledger(
    log: MemoryLog, tmp_path: Path
) -> None:
    kept = ledger(tmp_path / "ledger", log)
    forged = MemoryLog()
    await forged.append(B, [TimerFired(timer="1"), TimerFired(timer="2")], expected_version=0)
    report = await verify(forged, "r2", ledger=kept)
    assert named(report) == [("altered", B, 1), ("altered", B, 2)]


async def test_a_ledger_whose_last_line_is_torn_still_counts(log: MemoryLog, tmp_path: Path) -> None:
    kept = ledger(tmp_path / "ledger", log)
    kept.write_bytes(kept.read_bytes() + b'{"stream": "agent/r')
    assert (await verify(log, ledger=kept)).ledger == 6


async def test_a_ledger_that_is_none_is_a_users_error(log: MemoryLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        await verify(log, ledger=tmp_path / "absent")
    (tmp_path / "ledger").write_text("hello\nworld\n")
    with pytest.raises(ConfigError, match="line 1"):
        await verify(log, ledger=tmp_path / "ledger")


def test_a_problem_reads_as_a_sentence() -> None:
    problem = Problem("missing", A, 3, "", "the stream goes on to event 4 without it")
    assert str(problem) == "missing: event 3 of agent/r1: the stream goes on to event 4 without it"
