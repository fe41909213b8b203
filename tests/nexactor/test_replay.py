"""Replay needs the log alone, and one altered event, spec or decision makes it fail."""

from __future__ import annotations

import msgspec
import pytest

from nexactor.agent import decide as core
from nexactor.events import types as ev
from nexactor.events.errors import LogError
from nexactor.events.memory import MemoryLog
from nexactor.events.messages import Message
from nexactor.replay import replay_run
from nexactor.spec import load_stored_spec
from nexactor.system import Agent, System
from nexactor.testing import ScriptedModel, call, calls
from nexactor.tools import tool


@tool(repeat="safe")
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def _run(system: System) -> str:
    async with ScriptedModel([call("add", a=1, b=2), "three"]) as model:
        agent = Agent("adder", llm=model.llm, system_prompt="Add.", tools=[add])
        return (await system.run(agent, "1 + 2?")).run


async def _copy(
    log: MemoryLog, run: str, change: object, *, stream: str = "", into: MemoryLog | None = None
) -> MemoryLog:
    """A log with one stream's blobs and events, one event changed (its chain recomputed: a patient forger)."""
    forged = into or MemoryLog()
    stream = stream or f"agent/{run}"
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


async def _team_run(system: System) -> str:
    def script(messages: list[dict[str, object]]) -> object:
        if messages[0]["content"] == "You work." or messages[-1]["role"] == "tool":
            return "ok"
        return calls(("worker", {"message": "A"}))

    async with ScriptedModel(script) as model:
        worker = Agent("worker", llm=model.llm, system_prompt="You work.")
        return (await system.run(Agent("lead", llm=model.llm, sub_agents=[worker]), "go")).run


async def test_a_childs_stream_that_is_gone_or_says_something_else_is_found(system: System) -> None:
    assert isinstance(system.log, MemoryLog)
    run = await _team_run(system)
    root = await _copy(system.log, run, lambda e: e)
    report = await replay_run(root, run)
    assert report.divergence is not None
    assert "the child has no events" in report.divergence.replayed

    def change(event: ev.Event) -> ev.Event:
        return msgspec.structs.replace(event, input="B") if isinstance(event, ev.AgentStarted) else event

    other = await _copy(system.log, run, change, stream=f"agent/{run}/worker-1", into=root)
    report = await replay_run(other, run)
    assert report.divergence is not None


@pytest.mark.parametrize(
    "extra",
    [
        ev.ToolCallFinished(effect_id="none", tool_call_id="t", name="add", result="5"),
        ev.ModelCallFinished(call_id="none", message=Message("assistant", "x"), finish_reason="stop"),
        ev.RunFinished(status="failed", result="no"),
        ev.AgentFailed(error="no", infra=True),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_an_event_where_none_was_due_is_found(system: System, extra: ev.Event) -> None:
    assert isinstance(system.log, MemoryLog)
    run = await _run(system)
    await system.log.append(
        f"agent/{run}", [extra], expected_version=await system.log.version(f"agent/{run}")
    )
    assert not (await replay_run(system.log, run)).ok
