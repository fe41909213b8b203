"""A node dies or is cut off in the middle of a run; another takes over, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nexactor import cell, node
from nexactor.events import types as ev
from nexactor.events.memory import MemoryLog
from nexactor.replay import replay_run
from nexactor.system import Agent, Run, System
from nexactor.testing import ScriptedModel, call
from nexactor.tools import ToolContext, tool
from nexactor.transport_memory import MemoryNetwork

ran: list[tuple[str, str]] = []
gates: list[asyncio.Event] = []


@tool(repeat="safe")
async def look(context: ToolContext) -> str:
    """Look around."""
    ran.append(("look", context.effect_id))
    await gates[-1].wait()
    return "seen"


@tool(repeat="never")
async def fire(context: ToolContext) -> str:
    """Fire once."""
    ran.append(("fire", context.effect_id))
    await gates[-1].wait()
    return "fired"


class Cluster:
    """Two nodes in memory, and a client that hosts nothing."""

    def __init__(self, network: MemoryNetwork, log: MemoryLog, a: System, b: System, client: System) -> None:
        self.network, self.log, self.nodes, self.client = network, log, (a, b), client

    def owner(self, run: Run) -> System:
        """The node that has the run's root agent active."""
        return next(s for s in self.nodes if f"agent/{run.id}" in s.node._cells)

    def cut_off(self, system: System) -> None:
        """The node vanishes for the others, but lives on as a zombie that believes it owns its actors."""
        self.network.crash(system.node.id)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(node, "SWEEP_S", 0.01)
    monkeypatch.setattr(cell, "BACKOFF_S", 0.001)
    ran.clear()
    gates.append(asyncio.Event())  # of this test's event loop
    network, log = MemoryNetwork(), MemoryLog()
    async with (
        System(log=log, transport=network.transport(), name="a") as a,
        System(log=log, transport=network.transport(), name="b") as b,
        System(log=log, transport=network.transport(), name="client", host=False) as client,
    ):
        yield Cluster(network, log, a, b, client)


async def _until(run: Run, kind: type[ev.Event]) -> None:
    """Follow the log until the run has an event of this type."""
    from nexactor.events.cursor import START
    from nexactor.events.log import Filter

    async for recorded in run.system.log.subscribe(START, filter=Filter(run=run.id)):
        if isinstance(recorded.event, kind):
            return


async def test_a_finished_model_call_is_not_paid_twice(cluster: Cluster) -> None:
    release = asyncio.Event()

    async def script(messages: list[dict[str, object]]) -> str:
        await release.wait()
        return "paid once"

    async with ScriptedModel(script) as model:
        run = await cluster.client.start(Agent("a", llm=model.llm).tree(), "go")
        await _until(run, ev.ModelCallStarted)
        first = cluster.owner(run)
        release.set()
        cluster.cut_off(first)
        result = await run.wait()
    assert result.result == "paid once"
    ended = [r.event async for r in run.events() if isinstance(r.event, ev.ModelCallFinished)]
    assert len(ended) == 1
    assert (await replay_run(cluster.log, run.id)).ok


async def test_a_safe_tool_in_flight_is_run_again_by_the_next_owner(cluster: Cluster) -> None:
    async with ScriptedModel([call("look"), "done"]) as model:
        run = await cluster.client.start(Agent("a", llm=model.llm, tools=[look]).tree(), "go")
        await _until(run, ev.ToolCallStarted)
        cluster.cut_off(cluster.owner(run))
        gates[-1].set()
        assert (await run.wait()).result == "done"
    assert {name for name, _ in ran} == {"look"} and len({effect for _, effect in ran}) == 1
    ends = [r.event async for r in run.events() if isinstance(r.event, ev.ToolCallFinished)]
    assert len(ends) == 1


async def test_a_never_tool_in_flight_is_surfaced_not_repeated(cluster: Cluster) -> None:
    async with ScriptedModel([call("fire"), "noted"]) as model:
        run = await cluster.client.start(Agent("a", llm=model.llm, tools=[fire]).tree(), "go")
        await _until(run, ev.ToolCallStarted)
        zombie = cluster.owner(run)
        while not ran:
            await asyncio.sleep(0)
        cluster.cut_off(zombie)
        assert (await run.wait()).result == "noted"
    assert len(ran) == 1
    failed = [r.event async for r in run.events() if isinstance(r.event, ev.ToolCallFailed)]
    assert [f.outcome_unknown for f in failed] == [True]


async def test_a_zombie_owner_is_refused_by_the_log_and_leaves(cluster: Cluster) -> None:
    async with ScriptedModel([call("look"), "done"]) as model:
        run = await cluster.client.start(Agent("a", llm=model.llm, tools=[look]).tree(), "go")
        await _until(run, ev.ToolCallStarted)
        zombie = cluster.owner(run)
        actor_cell = zombie.node._cells[f"agent/{run.id}"]
        cluster.cut_off(zombie)
        while f"agent/{run.id}" not in {a for s in cluster.nodes if s is not zombie for a in s.node._cells}:
            await asyncio.sleep(0)
        gates[-1].set()
        assert (await run.wait()).status == "finished"
        while f"agent/{run.id}" in zombie.node._cells:
            await asyncio.sleep(0)
    assert actor_cell.fenced
    owners = [r.event.node async for r in run.events() if isinstance(r.event, ev.ActorActivated)]
    assert len(owners) == 2 and owners[0] == zombie.node.id != owners[1]


async def test_a_run_started_while_no_node_lives_waits_in_the_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "SWEEP_S", 0.01)
    network, log = MemoryNetwork(), MemoryLog()
    async with ScriptedModel(["late"]) as model:
        async with System(log=log, transport=network.transport(), host=False) as client:
            run = await client.start(Agent("a", llm=model.llm).tree(), "go")
            async with System(log=log, transport=network.transport()):
                assert (await run.wait()).result == "late"
