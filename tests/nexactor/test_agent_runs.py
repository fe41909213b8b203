"""Agents run, and everything they do is in the log."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from nexactor import cell
from nexactor.agent.shell import StartAgent
from nexactor.events import types as ev
from nexactor.events.messages import Message, ToolCall
from nexactor.replay import replay_run
from nexactor.system import Agent, Run, System
from nexactor.testing import ScriptedModel, call, calls
from nexactor.tools import tool


@tool(repeat="safe")
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_an_agent_calls_a_tool_and_answers(system: System) -> None:
    async with ScriptedModel([call("add", a=17, b=25), "It is 42."]) as model:
        run = await system.start(Agent("adder", llm=model.llm, tools=[add]), "17 + 25?")
        result = await run.wait()
    assert (result.status, result.result) == ("finished", "It is 42.")
    names = [type(r.event).__name__ async for r in run.events()]
    assert names == [
        "ActorActivated",
        "MessageReceived",
        "RunStarted",
        "AgentStarted",
        "ModelCallStarted",
        "ModelCallFinished",
        "ToolCallStarted",
        "ToolCallFinished",
        "ModelCallStarted",
        "ModelCallFinished",
        "AgentFinished",
        "RunFinished",
    ]
    assert model.requests[1]["messages"][-1]["content"] == "42"


async def test_a_prompt_is_stored_once(system: System) -> None:
    async with ScriptedModel([call("add", a=1, b=2), call("add", a=3, b=4), "done"]) as model:
        run = await system.start(Agent("adder", llm=model.llm, system_prompt="Add.", tools=[add]), "go")
        await run.wait()
    started = [r.event async for r in run.events() if isinstance(r.event, ev.ModelCallStarted)]
    assert [(e.keep, len(e.messages)) for e in started] == [(0, 2), (3, 1), (5, 1)]


async def test_sub_agents_run_in_parallel_and_their_answers_come_back_in_call_order(system: System) -> None:
    def script(messages: list[dict[str, object]]) -> object:
        last = messages[-1]
        if messages[0]["content"] == "You work.":
            return f"did {last['content']}"
        if last["role"] == "user":
            return calls(("worker", {"message": "A"}), ("worker", {"message": "B"}))
        return " and ".join(str(m["content"]) for m in messages if m["role"] == "tool")

    async with ScriptedModel(script) as model:
        worker = Agent("worker", llm=model.llm, system_prompt="You work.")
        lead = Agent("lead", llm=model.llm, system_prompt="You lead.", sub_agents=[worker])
        run = await system.start(lead, "both")
        result = await run.wait()
    assert result.result == "did A and did B"
    streams = {r.stream async for r in run.events()}
    assert streams == {f"agent/{run.id}", f"agent/{run.id}/worker-1", f"agent/{run.id}/worker-2"}
    report = await replay_run(system.log, run.id)
    assert report.ok and report.streams == 3 and report.prompts == 4


async def test_an_unknown_tool_and_bad_arguments_are_errors_the_model_reads(system: System) -> None:
    async with ScriptedModel([calls(("sub", {}), ("add", {"a": 1, "c": 2})), "sorry"]) as model:
        run = await system.start(Agent("adder", llm=model.llm, tools=[add]), "go")
        assert (await run.wait()).status == "finished"
    texts = [m["content"] for m in model.requests[1]["messages"] if m["role"] == "tool"]
    assert "there is no tool 'sub'; the tools are: add" in texts[0]
    assert texts[1].startswith("error: add: ")


async def test_an_agent_stops_at_max_iterations(system: System) -> None:
    async with ScriptedModel([call("add", a=i, b=i) for i in range(9)]) as model:
        run = await system.start(Agent("adder", llm=model.llm, tools=[add], max_iterations=3), "go")
        await run.wait()
    ends = [r.event async for r in run.events() if isinstance(r.event, ev.AgentFinished)]
    assert ends[0].reason == "max_iterations" and len(model.requests) == 3


async def test_a_stop_tool_ends_the_run_with_its_result(system: System) -> None:
    async with ScriptedModel([calls(("add", {"a": 1, "b": 1}))]) as model:
        run = await system.start(Agent("adder", llm=model.llm, tools=[add], stop_tools=["add"]), "go")
        result = await run.wait()
    assert result.result == "2" and len(model.requests) == 1
    assert (await replay_run(system.log, run.id)).ok


async def test_a_refused_model_call_fails_the_run_as_infrastructure(system: System) -> None:
    async with ScriptedModel([]) as model:
        run = await system.start(Agent("adder", llm=model.llm), "go")
        result = await run.wait()
    assert result.status == "failed" and "no more answers" in result.result
    failed = [r.event async for r in run.events() if isinstance(r.event, ev.AgentFailed)]
    assert failed[0].infra and len(model.requests) == 1, "a 400 is not retried"
    assert (await replay_run(system.log, run.id)).ok


async def test_the_same_run_id_twice_is_one_run(system: System) -> None:
    async with ScriptedModel(["once"]) as model:
        agent = Agent("a", llm=model.llm)
        await system.start(agent, "go", run="r1")
        await (await system.start(agent, "go", run="r1")).wait()
    assert len(model.requests) == 1


async def test_events_are_encodable_as_json_for_scripts(system: System) -> None:
    async with ScriptedModel(["ok"]) as model:
        run = await system.start(Agent("a", llm=model.llm), "go")
        await run.wait()
    assert all([msgspec.json.encode(r.event) async for r in run.events()])


async def test_children_have_names_of_their_own_when_tools_are_called_between_them(system: System) -> None:
    def script(messages: list[dict[str, object]]) -> object:
        if messages[0]["content"] == "You work.":
            return "ok"
        turn = sum(m["role"] == "assistant" for m in messages)
        first = calls(("add", {"a": 1, "b": 2}), ("worker", {"message": "A"}))
        return [first, calls(("worker", {"message": "B"})), "end"][turn]

    async with ScriptedModel(script) as model:
        worker = Agent("worker", llm=model.llm, system_prompt="You work.")
        lead = Agent("lead", llm=model.llm, system_prompt="You lead.", tools=[add], sub_agents=[worker])
        run = await system.start(lead, "go")
        assert (await run.wait()).result == "end"
    children = [r.event.child async for r in run.events() if isinstance(r.event, ev.SubAgentStarted)]
    assert children == [f"agent/{run.id}/worker-1", f"agent/{run.id}/worker-2"]
    assert (await replay_run(system.log, run.id)).ok


async def test_a_run_whose_spec_is_gone_ends_as_failed_instead_of_hanging(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "BACKOFF_S", 0.0001)
    await system._watch("r1")
    start = StartAgent(spec="0" * 64, input="go")
    await system.node.command("agent/r1", start, id="agent/r1#start")
    result = await Run(system, "r1").wait()
    assert result.status == "failed"
    while await system.node.transport.addresses_pending():
        await asyncio.sleep(0)


async def test_a_run_cancelled_before_its_start_arrives_never_begins(system: System) -> None:
    async with ScriptedModel(["never"]) as model:
        run = Run(system, "r1")
        await run.cancel("changed my mind")
        while await system.node.transport.addresses_pending():
            await asyncio.sleep(0)
        await system.start(Agent("a", llm=model.llm), "go", run="r1")
        assert (await run.wait()).status == "cancelled"
        assert model.requests == []
    assert (await replay_run(system.log, "r1")).ok


async def test_a_cancelled_run_takes_its_children_with_it(system: System) -> None:
    working = asyncio.Event()

    async def script(messages: list[dict[str, object]]) -> object:
        if messages[0]["content"] == "You work.":
            working.set()
            await asyncio.Event().wait()
        return calls(("worker", {"message": "A"}))

    async with ScriptedModel(script) as model:
        worker = Agent("worker", llm=model.llm, system_prompt="You work.")
        run = await system.start(Agent("lead", llm=model.llm, sub_agents=[worker]), "go")
        await working.wait()
        await run.cancel("enough")
        assert (await run.wait()).status == "cancelled"
        while await system.node.transport.addresses_pending():
            await asyncio.sleep(0)
    cancelled = {r.stream async for r in run.events() if isinstance(r.event, ev.AgentCancelled)}
    assert cancelled == {f"agent/{run.id}", f"agent/{run.id}/worker-1"}
    assert (await replay_run(system.log, run.id)).ok


async def test_two_calls_with_one_id_get_their_own_results(system: System) -> None:
    twice = Message(
        "assistant",
        tool_calls=(ToolCall("same", "add", '{"a":1,"b":1}'), ToolCall("same", "add", '{"a":2,"b":2}')),
    )
    async with ScriptedModel([twice, "done"]) as model:
        await system.run(Agent("adder", llm=model.llm, tools=[add]), "go")
    assert [m["content"] for m in model.requests[1]["messages"] if m["role"] == "tool"] == ["2", "4"]


async def test_many_starts_share_one_follower_of_the_log(system: System) -> None:
    async with ScriptedModel(lambda messages: "ok") as model:
        agent = Agent("a", llm=model.llm)
        runs = await asyncio.gather(*(system.start(agent, str(i)) for i in range(8)))
        followers = [t for t in asyncio.all_tasks() if getattr(t.get_coro(), "__name__", "") == "_follow"]
        assert len(followers) == 1
        assert {r.status for r in await asyncio.gather(*(run.wait() for run in runs))} == {"finished"}
