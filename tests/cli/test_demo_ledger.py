"""The demo's zeros are counted: each kind of loss or repetition, put in on purpose, is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nexactor.cli.demo.ledger import Accounts, audit
from nexactor.events import types as ev
from nexactor.events.errors import LogError
from nexactor.events.memory import MemoryLog
from nexactor.events.messages import Message, TokenTrace

ANSWER = Message("assistant", "ok")
TOKENS = TokenTrace(0, b"\1\0\0\0", b"\2\0\0\0", b"\0\0\0\0")


async def _log(extra: tuple[ev.Event, ...] = ()) -> MemoryLog:
    log = MemoryLog()
    events: list[ev.Event] = [
        ev.ModelCallFinished(call_id="c1", message=ANSWER, finish_reason="stop", tokens=TOKENS),
        ev.ToolCallStarted(effect_id="e1", tool_call_id="t", name="w", arguments="{}", repeat="idempotent"),
        ev.ToolCallFinished(effect_id="e1", tool_call_id="t", name="w", result="ok"),
        *extra,
        ev.RunFinished(status="finished"),
    ]
    await log.append("agent/r1", events, expected_version=0)
    return log


async def _audit(tmp_path: Path, log: MemoryLog, **changes: Any) -> Accounts:
    journal = tmp_path / "node.jsonl"
    if not journal.exists():
        last = [r async for r in log.read("agent/r1")][-1]
        entry = {"stream": "agent/r1", "version": last.version, "hash": last.hash.hex()}
        journal.write_text(json.dumps(entry) + "\n")
    given: dict[str, Any] = {
        "runs": ["r1"],
        "append_journals": [journal],
        "generation_counts": {"c1": 1},
        "effect_counts": [{"e1": 1}],
        **changes,
    }
    return await audit(log, **given)


async def test_a_clean_log_balances(tmp_path: Path) -> None:
    a = await _audit(tmp_path, await _log())
    assert (a.runs_lost, a.events_lost, a.model_calls_repeated, a.effects_repeated) == (0, 0, 0, 0)
    assert (a.runs, a.events, a.model_calls, a.generations, a.effects, a.acknowledged) == (1, 4, 1, 1, 1, 1)


async def test_a_run_that_never_finished_is_lost(tmp_path: Path) -> None:
    assert (await _audit(tmp_path, await _log(), runs=["r1", "r2"])).runs_lost == 1


@pytest.mark.parametrize("entry", [{"version": 9}, {"hash": "00"}, {"stream": "agent/r2"}])
async def test_an_acknowledged_append_that_the_log_lacks_is_lost(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    log = await _log()
    last = [r async for r in log.read("agent/r1")][-1]
    line = {"stream": "agent/r1", "version": last.version, "hash": last.hash.hex(), **entry}
    (tmp_path / "node.jsonl").write_text(json.dumps(line) + "\n")
    assert (await _audit(tmp_path, log)).events_lost == 1


async def test_a_call_generated_twice_or_ended_twice_is_repeated(tmp_path: Path) -> None:
    assert (await _audit(tmp_path, await _log(), generation_counts={"c1": 2})).model_calls_repeated == 1
    again = ev.ModelCallFinished(call_id="c1", message=ANSWER, finish_reason="stop")
    other = tmp_path / "other"
    other.mkdir()
    assert (await _audit(other, await _log((again,)))).model_calls_repeated == 1


async def test_an_effect_applied_twice_is_repeated(tmp_path: Path) -> None:
    assert (await _audit(tmp_path, await _log(), effect_counts=[{"e1": 2}])).effects_repeated == 1


@pytest.mark.parametrize("missing", ["generation_counts", "effect_counts"])
async def test_a_ledger_that_lacks_what_the_log_has_is_an_error_not_a_zero(
    tmp_path: Path, missing: str
) -> None:
    with pytest.raises(LogError, match="ledger of the"):
        await _audit(tmp_path, await _log(), **{missing: {} if missing == "generation_counts" else []})


async def test_a_generation_that_is_in_no_run_was_paid_for_in_vain(tmp_path: Path) -> None:
    a = await _audit(tmp_path, await _log(), generation_counts={"c1": 1, "c2": 1})
    assert a.model_calls_repeated == 1


async def test_a_failed_run_is_counted(tmp_path: Path) -> None:
    log = await _log()
    await log.append("agent/r2", [ev.RunFinished(status="failed")], expected_version=0)
    assert (await _audit(tmp_path, log, runs=["r1", "r2"])).runs_failed == 1


@pytest.mark.parametrize(
    "steps",
    [[(1, "a"), (1, "b")], [(1, "a"), (3, "b")], [(1, "a"), (2, "a")]],
    ids=["twice", "gap", "event twice"],
)
async def test_a_step_done_twice_left_out_or_trained_on_the_same_call_is_irregular(
    tmp_path: Path, steps: list[tuple[int, str]]
) -> None:
    log = await _log()
    events = [ev.LearnerStep(step=n, events=(id,), cursor="1") for n, id in steps]
    await log.append("learner/demo", events, expected_version=0)
    assert (await _audit(tmp_path, log)).steps_irregular == 1
