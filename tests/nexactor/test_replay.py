"""Replay needs the log alone, and one altered event, spec or decision makes it fail."""

from __future__ import annotations

import msgspec
import pytest

from nexactor.agent import decide as core
from nexactor.events import types as ev
from nexactor.events.errors import LogError
from nexactor.events.memory import MemoryLog
from nexactor.replay import replay_run
from nexactor.spec import load_stored_spec
from nexactor.system import Agent, System
from nexactor.testing import ScriptedModel, call
from nexactor.tools import tool


@tool(repeat="safe")
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def _run(system: System) -> str:
    async with ScriptedModel([call("add", a=1, b=2), "three"]) as model:
        agent = Agent("adder", llm=model.llm, system_prompt="Add.", tools=[add])
        return (await system.run(agent, "1 + 2?")).run


async def _copy(log: MemoryLog, run: str, change: object) -> MemoryLog:
    """A log with the same blobs and events, but for one changed event (its chain recomputed: a patient forger)."""
    forged = MemoryLog()
    stream = f"agent/{run}"
    events = [change(r.event) async for r in log.read(stream)]  # type: ignore[operator]
    for event in events:
        if isinstance(event, ev.AgentStarted | ev.ModelCallStarted):
            digest = event.spec if isinstance(event, ev.AgentStarted) else event.tools
            await forged.put_blob(await log.get_blob(digest))
    for i, event in enumerate(events):
        await forged.append(stream, [event], expected_version=i)
    return forged


async def test_a_run_replays_with_its_model_gone(system: System) -> None:
    run = await _run(system)
    report = await replay_run(system.log, run)
    assert report.ok and (report.streams, report.prompts) == (1, 2) and report.events == 12


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ev.AgentStarted, "input", "1 + 3?"),
        (ev.ToolCallFinished, "result", "4"),
        (ev.ToolCallStarted, "arguments", '{"a":1,"b":3}'),
        (ev.ModelCallStarted, "prompt", "0" * 64),
        (ev.ModelCallStarted, "keep", 1),
        (ev.AgentFinished, "result", "four"),
        (ev.RunFinished, "result", "four"),
    ],
)
async def test_one_altered_event_diverges_even_with_its_hashes_made_good(
    system: System, kind: type[ev.Event], field: str, value: object
) -> None:
    assert isinstance(system.log, MemoryLog)
    run = await _run(system)
    same = await _copy(system.log, run, lambda e: e)
    assert (await replay_run(same, run)).ok

    def change(event: ev.Event) -> ev.Event:
        return msgspec.structs.replace(event, **{field: value}) if isinstance(event, kind) else event

    report = await replay_run(await _copy(system.log, run, change), run)
    assert not report.ok


async def test_one_altered_word_of_the_prompt_diverges(system: System) -> None:
    assert isinstance(system.log, MemoryLog)
    run = await _run(system)
    (started,) = [
        r.event async for r in system.log.read(f"agent/{run}") if isinstance(r.event, ev.AgentStarted)
    ]
    spec = await load_stored_spec(system.log, started.spec)
    other = msgspec.structs.replace(spec, system_prompt="Add!")
    digest = await system.log.put_blob(msgspec.json.encode(other, order="deterministic"))

    def change(event: ev.Event) -> ev.Event:
        return msgspec.structs.replace(event, spec=digest) if isinstance(event, ev.AgentStarted) else event

    report = await replay_run(await _copy(system.log, run, change), run)
    assert report.divergence is not None
    assert "Add!" in report.divergence.replayed


async def test_other_agent_code_diverges_and_both_sides_are_shown(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await _run(system)
    real = core.render
    monkeypatch.setattr(core, "render", lambda state: real(state)[1:])
    report = await replay_run(system.log, run)
    assert report.divergence is not None
    assert (
        "ModelCallStarted" in report.divergence.recorded and "ModelCallStarted" in report.divergence.replayed
    )


async def test_an_unknown_run_is_an_error(system: System) -> None:
    with pytest.raises(LogError, match="no run nope"):
        await replay_run(system.log, "nope")
