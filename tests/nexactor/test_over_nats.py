"""Agents over the real broker: two nodes, real processes, real kills."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nexactor.events import types as ev
from nexactor.events.broker import broker_pid
from nexactor.events.cursor import START
from nexactor.events.log import Filter
from nexactor.replay import replay_run
from nexactor.system import Agent, Run, System
from nexactor.testing import ScriptedModel, call, calls
from nexactor.tools.files import read_file, write_file


def _team(model: ScriptedModel) -> Agent:
    worker = Agent("worker", llm=model.llm, system_prompt="You work.", tools=[write_file, read_file])
    return Agent("lead", llm=model.llm, system_prompt="You lead.", sub_agents=[worker], tools=[read_file])


def _script(messages: list[dict[str, object]]) -> object:
    """The lead hands over, the worker writes; both answer in the end."""
    last = messages[-1]
    if last["role"] == "tool":
        return f"told: {last['content']}"
    if messages[0]["content"] == "You work.":
        return call("write_file", path="a.txt", content="hello")
    return calls(("worker", {"message": "write it"}))


@pytest.fixture
async def systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[System, System]]:
    monkeypatch.delenv("NEXACTOR_NATS_URL", raising=False)
    async with System(data=tmp_path / "data", name="a") as a, System(data=tmp_path / "data", name="b") as b:
        yield a, b


async def test_parent_and_worker_live_on_two_nodes_and_talk_over_nats(
    systems: tuple[System, System], tmp_path: Path
) -> None:
    (tmp_path / "w").mkdir()
    async with ScriptedModel(_script) as model:
        run = await systems[0].start(_team(model).tree(), "go", workspace=tmp_path / "w")
        result = await run.wait()
    assert result.status == "finished"
    assert (tmp_path / "w" / "a.txt").read_text() == "hello\n"
    nodes = {r.stream: r.envelope.node async for r in run.events() if r.stream.startswith("agent/")}
    assert len(nodes) == 2
    assert len(set(nodes.values())) == 2
    assert (await replay_run(systems[1].log, run.id)).ok


async def test_runs_go_on_when_the_broker_is_killed_under_them(
    systems: tuple[System, System], tmp_path: Path
) -> None:
    held: list[asyncio.Future[None]] = []

    async def script(messages: list[dict[str, object]]) -> object:
        gate = asyncio.get_running_loop().create_future()
        held.append(gate)
        await gate
        return "done"

    async with ScriptedModel(script) as model:
        runs = [await systems[0].start(Agent("a", llm=model.llm).tree(), str(i)) for i in range(6)]
        while len(held) < 6:
            await asyncio.sleep(0.01)
        pid = broker_pid(tmp_path / "data")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for gate in held:
            gate.set_result(None)
        results = [await run.wait() for run in runs]
    assert {r.status for r in results} == {"finished"}
    assert all(n == 1 for n in model.generated.values())
    for run in runs:
        assert (await replay_run(systems[0].log, run.id)).ok


async def _until(run: Run, kind: type[ev.Event]) -> str:
    """The node that appended the run's first event of this type."""
    async for recorded in run.system.log.subscribe(START, filter=Filter(run=run.id)):
        if isinstance(recorded.event, kind):
            return recorded.envelope.node
    raise AssertionError("the log ended")


async def test_another_node_takes_over_from_a_process_killed_with_sigkill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEXACTOR_NATS_URL", raising=False)
    data = tmp_path / "data"
    gate = asyncio.Event()

    async def script(messages: list[dict[str, object]]) -> object:
        await gate.wait()
        return "survived"

    async with ScriptedModel(script) as model, System(data=data, host=False) as client:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nexactor", "--data", str(data), "node", "--name", "victim"
        )
        try:
            run = await client.start(Agent("a", llm=model.llm).tree(), "go")
            victim = await _until(run, ev.ModelCallStarted)
            process.kill()
            await process.wait()
            async with System(data=data, name="heir") as heir:
                gate.set()
                assert (await run.wait()).result == "survived"
                owners = [r.event.node async for r in run.events() if isinstance(r.event, ev.ActorActivated)]
                assert owners == [victim, heir.node.id]
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert list(model.generated.values()) == [1]
