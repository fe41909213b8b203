"""Trajectories: segments by exact tokens, splits with their reason, runs emitted once, restarts that lose nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexactor.events import types as ev
from nexactor.events.cursor import START, Cursor
from nexactor.events.envelope import Recorded
from nexactor.events.memory import MemoryLog
from nexactor.events.messages import Message, TokenTrace
from nexactor.events.trajectory import (
    TRAJECTORY_TYPES,
    AssemblerState,
    Trajectory,
    TrajectoryAssembler,
    assemble,
    decode_ids,
    decode_logprobs,
    encode_ids,
    encode_logprobs,
    to_json,
)

USER = Message("user", "do it")


class Agent:
    """Builds one agent's events, call by call."""

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.calls = 0
        self.messages = 0

    def call(
        self,
        answer: str = "ok",
        *,
        keep: int = 0,
        prompt: Sequence[int] = (),
        ids: Sequence[int] | None = None,
        messages: Sequence[Message] = (USER,),
        keep_messages: int | None = None,
        tools: str = "",
        tokenizer: str = "t",
    ) -> Agent:
        self.calls += 1
        call_id = f"c{self.calls}"
        trace = None
        if ids is not None:
            logprobs = encode_logprobs([-0.5] * len(ids))
            trace = TokenTrace(keep, encode_ids(prompt), encode_ids(ids), logprobs, tokenizer)
        kept = self.messages if keep_messages is None else keep_messages
        self.events += [
            ev.ModelCallStarted(
                call_id=call_id, model="m", keep=kept, messages=tuple(messages), tools=tools, prompt="p"
            ),
            ev.ModelCallFinished(
                call_id=call_id,
                message=Message("assistant", answer),
                finish_reason="stop",
                policy_version=f"v{self.calls}",
                tokens=trace,
            ),
        ]
        self.messages = kept + len(messages) + 1
        return self

    def add(self, *events: ev.Event) -> Agent:
        self.events += events
        return self


async def write(
    log: MemoryLog, run: str, agent: Agent, *, reward: float | None = 1.0, status: str = "finished"
) -> None:
    await log.append(
        f"agent/{run}",
        [
            ev.ActorActivated(node="n"),
            ev.RunStarted(task="t", spec="s", agent="root", labels={"split": "train"}),
            ev.AgentStarted(name="root", spec="s", input="t"),
            *agent.events,
            ev.AgentFinished(result="r"),
            ev.RunFinished(status=status, result="r"),
        ],
        expected_version=0,
    )
    if reward is not None:
        await rate(log, run, reward)


async def rate(log: MemoryLog, run: str, reward: float, source: str = "check") -> None:
    stream = f"annotation/{run}"
    event = ev.RewardAssigned(run=run, reward=reward, source=source)
    await log.append(stream, [event], expected_version=await log.version(stream))


async def everything(log: MemoryLog, after: int = 0) -> list[Recorded]:
    return [r async for r in log.subscribe(Cursor((after,)), follow=False)]


async def one(agent: Agent, **kwargs: Any) -> Trajectory:
    log = MemoryLog()
    await write(log, "r1", agent, **kwargs)
    (trajectory,) = assemble(await everything(log))
    return trajectory


async def test_calls_whose_prompts_keep_every_token_form_one_segment() -> None:
    trajectory = await one(Agent().call(prompt=[1, 2], ids=[3, 4]).call(keep=4, prompt=[5], ids=[6]))
    (segment,) = trajectory.agents[0].segments
    assert decode_ids(segment.ids) == [1, 2, 3, 4, 5, 6]
    assert list(segment.mask) == [0, 0, 1, 1, 0, 1]
    assert decode_logprobs(segment.logprobs) == [0, 0, -0.5, -0.5, 0, -0.5]
    assert [(s.start, s.stop, s.policy_version) for s in segment.spans] == [(2, 4, "v1"), (5, 6, "v2")]
    assert trajectory.agents[0].splits == {}


async def test_a_rewritten_prompt_starts_a_segment_with_the_tokens_it_kept() -> None:
    trajectory = await one(Agent().call(prompt=[1, 2], ids=[3, 4]).call(keep=3, prompt=[9], ids=[6]))
    first, second = trajectory.agents[0].segments
    assert decode_ids(first.ids) == [1, 2, 3, 4]
    assert decode_ids(second.ids) == [1, 2, 3, 9, 6]
    assert list(second.mask) == [0, 0, 0, 0, 1]
    assert second.started == "prompt_rewritten"
    assert trajectory.agents[0].splits == {"prompt_rewritten": 1}


async def test_a_split_after_a_compaction_says_so() -> None:
    agent = Agent().call(prompt=[1, 2], ids=[3]).add(ev.ContextCompacted(dropped=2))
    trajectory = await one(agent.call(keep=1, prompt=[8], ids=[9]))
    assert trajectory.agents[0].splits == {"compacted": 1}


async def test_another_tokenizer_starts_a_segment() -> None:
    agent = Agent().call(prompt=[1], ids=[2]).call(keep=0, prompt=[7], ids=[8], tokenizer="u")
    assert (await one(agent)).agents[0].splits == {"tokenizer_changed": 1}


async def test_a_prompt_that_keeps_tokens_the_log_does_not_have_is_counted_and_not_guessed() -> None:
    agent = Agent().call(prompt=[1], ids=[2]).call(keep=9, prompt=[3], ids=[4])
    trajectory = await one(agent.call(keep=0, prompt=[5], ids=[6]))
    assert trajectory.agents[0].lost_calls == 1
    assert not trajectory.complete
    assert [decode_ids(s.ids) for s in trajectory.agents[0].segments] == [[1, 2], [5, 6]]


async def test_calls_without_token_ids_form_a_text_segment_with_their_messages() -> None:
    result = Message("tool", "42", tool_call_id="x")
    trajectory = await one(Agent().call("a", tools="d").call("b", messages=(result,), tools="d"))
    (segment,) = trajectory.agents[0].segments
    assert segment.text
    assert segment.tools == "d"
    assert [m.content for m in segment.messages] == ["do it", "a", "42", "b"]
    assert [s.message for s in segment.spans] == [1, 3]


async def test_a_text_call_that_drops_messages_starts_a_segment() -> None:
    trajectory = await one(Agent().call("a").call("b", keep_messages=0))
    assert trajectory.agents[0].splits == {"prompt_rewritten": 1}
    assert len(trajectory.agents[0].segments) == 2


async def test_a_failed_call_between_two_does_not_split_them() -> None:
    agent = Agent().call("a")
    agent.add(
        ev.ModelCallStarted(call_id="x", model="m", keep=2, messages=(USER,), tools="", prompt="p"),
        ev.ModelCallFailed(call_id="x", error="busy"),
    )
    trajectory = await one(agent.call("b", messages=(), keep_messages=3))
    assert trajectory.agents[0].splits == {}
    assert trajectory.agents[0].failed_calls == 1


async def test_text_and_token_calls_of_one_agent_are_kept_apart() -> None:
    agent = Agent().call("a").call(prompt=[1, 2], ids=[3]).call("b")
    trajectory = await one(agent)
    assert [s.text for s in trajectory.agents[0].segments] == [True, False, True]
    assert trajectory.agents[0].splits == {"text_before": 1, "no_token_ids": 1}


async def test_sub_agents_are_parts_of_the_run_with_their_parents(example_run: Any) -> None:
    log = MemoryLog()
    for stream, events in example_run("r1", "count"):
        await log.append(stream, events, expected_version=await log.version(stream))
    (trajectory,) = assemble(await everything(log))
    assert [(a.stream, a.name, a.outcome) for a in trajectory.agents] == [
        ("agent/r1", "lead", "finished"),
        ("agent/r1/worker-1", "worker", "finished"),
    ]
    assert trajectory.labels == {"split": "train"}
    assert trajectory.complete
    assert trajectory.reward == 0.75


async def test_a_run_waits_for_its_reward_unless_told_otherwise() -> None:
    log = MemoryLog()
    await write(log, "r1", Agent().call("a"), reward=None)
    assert assemble(await everything(log)) == []
    assert len(assemble(await everything(log), wait_for_reward=False)) == 1
    await rate(log, "r1", 0.5)
    assert assemble(await everything(log))[0].reward == 0.5


async def test_a_run_that_failed_for_infrastructure_reasons_waits_for_nobody() -> None:
    log = MemoryLog()
    await log.append(
        "agent/r1",
        [
            ev.RunStarted(task="t", spec="s", agent="root"),
            ev.AgentFailed(error="away", infra=True),
            ev.RunFinished(status="failed"),
        ],
        expected_version=0,
    )
    (trajectory,) = assemble(await everything(log))
    assert trajectory.infra


async def test_the_newest_reward_of_each_source_counts() -> None:
    log = MemoryLog()
    await log.append("agent/r1", [ev.RunStarted(task="t", spec="s", agent="root")], expected_version=0)
    for source, value in [("check", 0.0), ("person", 1.0), ("check", 0.25)]:
        await rate(log, "r1", value, source)
    await log.append("agent/r1", [ev.RunFinished(status="finished")], expected_version=1)
    (trajectory,) = assemble(await everything(log))
    assert trajectory.reward == 0.25
    assert trajectory.reward_by("person") == 1.0
    assert trajectory.reward_by("nobody") is None


async def test_rewards_after_a_run_was_emitted_are_counted_and_open_nothing() -> None:
    log = MemoryLog()
    await write(log, "r1", Agent().call("a"))
    await rate(log, "r1", 0.0)
    assembler = TrajectoryAssembler()
    emitted = [t for r in await everything(log) for t in assembler.add(r)]
    assert len(emitted) == 1
    assert assembler.counts["late_rewards"] == 1
    assert assembler.open_runs == 0


async def test_runs_that_began_before_the_cursor_are_not_made_up_from_their_rest() -> None:
    log = MemoryLog()
    await write(log, "r1", Agent().call("a"))
    events = await everything(log)
    assembler = TrajectoryAssembler()
    assert [t for r in events[3:] for t in assembler.add(r)] == []
    assert assembler.counts["headless_events"] > 0


async def test_beyond_its_limit_the_oldest_open_run_is_given_up() -> None:
    log = MemoryLog()
    for i in range(5):
        await log.append(f"agent/r{i}", [ev.RunStarted(task="t", spec="s", agent="root")], expected_version=0)
    assembler = TrajectoryAssembler(max_runs=3)
    for recorded in await everything(log):
        assembler.add(recorded)
    assert assembler.counts["evicted_runs"] == 2
    assert assembler.open_runs == 3


async def test_beyond_its_bytes_the_oldest_open_run_is_given_up() -> None:
    log = MemoryLog()
    long = Agent().call("x" * 5000)
    await write(log, "r1", long, reward=None)
    await write(log, "r2", long, reward=None)
    assembler = TrajectoryAssembler(max_bytes=9000)
    for recorded in await everything(log):
        assembler.add(recorded)
    assert assembler.counts["evicted_runs"] == 1
    assert assembler.open_runs == 1


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data(), max_runs=st.sampled_from([3, 1000]))
async def test_a_restart_from_the_safe_cursor_emits_exactly_the_rest(data: Any, max_runs: int) -> None:
    log = MemoryLog()
    names = [f"r{i}" for i in range(6)]
    steps = dict.fromkeys(names, 0)
    # Interleave the four appends of six runs at random; some never end.
    for name in data.draw(st.lists(st.sampled_from(names), max_size=30)):
        step, steps[name] = steps[name], steps[name] + 1
        stream = f"agent/{name}"
        if step == 0:
            await log.append(stream, [ev.RunStarted(task="t", spec="s", agent="root")], expected_version=0)
        elif step == 1:
            await log.append(stream, Agent().call("a").events, expected_version=1)
        elif step == 2:
            await log.append(stream, [ev.RunFinished(status="finished")], expected_version=3)
        else:
            await rate(log, name, step)
    events = await everything(log)
    whole = TrajectoryAssembler(max_runs=max_runs)
    expected = [t for r in events for t in whole.add(r)]

    cut = data.draw(st.integers(0, len(events)))
    first = TrajectoryAssembler(max_runs=max_runs)
    emitted = [t for r in events[:cut] for t in first.add(r)]
    state = first.state
    again = TrajectoryAssembler(state, max_runs=max_runs)
    emitted += [t for r in await everything(log, state.cursor) for t in again.add(r)]
    assert emitted == expected
    assert again.counts == whole.counts
    assert again.state.cursor == whole.state.cursor


async def test_the_state_stays_small_when_runs_come_and_go() -> None:
    log = MemoryLog()
    for i in range(20):
        await write(log, f"r{i}", Agent().call("a"))
    assembler = TrajectoryAssembler()
    for recorded in await everything(log):
        assembler.add(recorded)
    assert len(assembler.state.closed) <= 1
    assert assembler.state.cursor == (await log.head()).positions[0]


async def test_the_fold_needs_only_the_types_it_names() -> None:
    log = MemoryLog()
    await write(log, "r1", Agent().call(prompt=[1], ids=[2]))
    events = await everything(log)
    few = [r for r in events if r.envelope.type in TRAJECTORY_TYPES]
    assert len(few) < len(events)
    assert assemble(few) == assemble(events)


async def test_the_json_form_has_ids_mask_messages_and_reward() -> None:
    value = json.loads(json.dumps(to_json(await one(Agent().call("hi", prompt=[1, 2], ids=[3])))))
    segment = value["agents"][0]["segments"][0]
    assert segment["ids"] == [1, 2, 3]
    assert segment["mask"] == [0, 0, 1]
    assert segment["logprobs"] == [0, 0, -0.5]
    assert segment["messages"][-1] == {"role": "assistant", "content": "hi"}
    assert value["reward"] == 1.0
    assert value["labels"] == {"split": "train"}


@pytest.mark.parametrize("ids", [[], [0, 1, 2**32 - 1]])
def test_ids_survive_their_stored_form(ids: list[int]) -> None:
    assert decode_ids(encode_ids(ids)) == ids


def test_a_fresh_state_begins_at_the_start() -> None:
    assert Cursor((AssemblerState().cursor,)) == START
