"""The read models: the run list and a run's tree, folded from events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nexactor.events import types as ev
from nexactor.events.cursor import START, Cursor
from nexactor.events.envelope import Recorded
from nexactor.events.fold import Projection
from nexactor.events.log import Filter
from nexactor.events.memory import MemoryLog
from nexactor.events.messages import Message, Usage
from nexactor.events.projections import RUN_KINDS, RunSummary, list_runs, run_tree, summarize

ExampleRun = Callable[..., Sequence[tuple[str, Sequence[ev.Event]]]]


async def recorded(appends: Sequence[tuple[str, Sequence[ev.Event]]]) -> tuple[MemoryLog, list[Recorded]]:
    """A log whose clock ticks once a nanosecond from 100, with these appends, and all its events."""
    ticks = iter(range(100, 10_000))
    log = MemoryLog(clock=lambda: next(ticks))
    for stream, events in appends:
        await log.append(stream, events, expected_version=await log.version(stream))
    return log, [r async for r in log.subscribe(START, follow=False)]


async def test_a_run_is_counted_while_it_goes_on(example_run: ExampleRun) -> None:
    _, events = await recorded(example_run("r1", "count"))
    summary = RunSummary("r1")
    statuses = []
    for event in events:
        summary = summarize(summary, event)
        statuses.append(summary.status)
    assert statuses == ["starting"] + ["running"] * 13 + ["finished"] * 2
    assert (summary.agents, summary.takeovers, summary.reward) == (2, 1, 0.75)
    assert summary.duration(now=10**9) == events[14].envelope.time - events[1].envelope.time


def test_a_run_that_has_not_started_has_no_duration() -> None:
    assert RunSummary("r1").duration(now=10**9) == 0


async def test_only_agents_and_annotations_make_runs(example_run: ExampleRun) -> None:
    appends = [("learner/sft", [ev.LearnerStep(step=1, events=(), cursor="0")]), *example_run("r1", "count")]
    _, events = await recorded(appends)
    runs: dict[str, RunSummary] = {}
    for event in events:
        runs = list_runs(runs, event)
    assert list(runs) == ["r1"]


async def test_the_run_list_goes_on_from_its_cursor(example_run: ExampleRun) -> None:
    log, events = await recorded([*example_run("r1", "a"), *example_run("r2", "b")])
    whole = Projection[dict[str, RunSummary]]({}, list_runs, filter=Filter(kinds=RUN_KINDS))
    await whole.catch_up(log)
    half: dict[str, RunSummary] = {}
    for event in events[:9]:
        half = list_runs(half, event)
    rest = Projection(half, list_runs, cursor=Cursor((events[8].position,)), filter=Filter(kinds=RUN_KINDS))
    assert await rest.catch_up(log) == whole.state


async def test_a_reward_for_a_part_is_not_the_runs_reward(example_run: ExampleRun) -> None:
    part = ev.RewardAssigned(run="r1", reward=0.1, source="critic", target="agent/r1/worker-1")
    _, events = await recorded([*example_run("r1", "count"), ("annotation/r1", [part])])
    tree = run_tree("r1", events)
    assert tree.summary.reward == 0.75
    assert tree.rewards[-1] == part


async def test_a_tree_places_sub_agents_below_the_step_that_called_them(example_run: ExampleRun) -> None:
    _, events = await recorded(example_run("r1", "count"))
    tree = run_tree("r1", events)
    assert tree.root is not None
    assert [(s.kind, s.name, s.status, s.index, s.end_index) for s in tree.root.steps] == [
        ("model", "tiny", "ok", 4, 5),
        ("tool", "read_file", "failed", 6, 11),
        ("agent", "worker", "ok", 7, 13),
    ]
    child = tree.root.steps[2].agent
    assert child is not None
    assert (child.name, child.status, child.result, child.nodes) == (
        "worker",
        "finished",
        "three",
        ("node-b", "node-a"),
    )
    assert tree.root.steps[1].duration == events[10].envelope.time - events[5].envelope.time
    assert tree.orphans == ()


async def test_an_agent_whose_calling_step_is_missing_is_still_shown() -> None:
    start = ev.AgentStarted(name="worker", spec="w", input="count")
    _, events = await recorded([("agent/r1/worker-1", [start])])
    tree = run_tree("r1", events)
    assert tree.root is None
    assert [a.name for a in tree.orphans] == ["worker"]


async def test_what_is_open_says_so_and_what_is_unknown_too() -> None:
    called = ev.ToolCallStarted(effect_id="t1", tool_call_id="c", name="pay", arguments="{}", repeat="never")
    unknown = ev.ToolCallFailed(effect_id="t1", tool_call_id="c", name="pay", error="?", outcome_unknown=True)
    model = ev.ModelCallStarted(call_id="m", model="x", keep=0, messages=(), tools="", prompt="")
    _, events = await recorded([("agent/r1", [called, model]), ("agent/r1", [unknown])])
    root: Any = run_tree("r1", events).root
    assert [(s.name, s.status, s.duration > 0) for s in root.steps] == [
        ("pay", "unknown", True),
        ("x", "open", False),
    ]


async def test_refused_arguments_are_a_step_that_ended_without_a_start() -> None:
    refused = ev.ToolCallFailed(effect_id="t1", tool_call_id="c", name="pay", error="amount is missing")
    _, events = await recorded([("agent/r1", [refused])])
    root: Any = run_tree("r1", events).root
    assert [(s.name, s.status, s.output) for s in root.steps] == [("pay", "failed", "amount is missing")]


async def test_an_effect_that_a_recovery_starts_again_keeps_its_first_place() -> None:
    start = ev.ToolCallStarted(effect_id="t1", tool_call_id="c", name="read", arguments="{}", repeat="safe")
    end = ev.ToolCallFinished(effect_id="t1", tool_call_id="c", name="read", result="x", attempts=2)
    _, events = await recorded([("agent/r1", [start]), ("agent/r1", [start]), ("agent/r1", [end])])
    root: Any = run_tree("r1", events).root
    assert [(s.index, s.end_index, s.attempts) for s in root.steps] == [(1, 3, 2)]


async def test_limits_approvals_and_compactions_are_notes_in_their_place() -> None:
    finished = ev.ModelCallFinished(
        call_id="m", message=Message("assistant", "hi"), finish_reason="stop", usage=Usage(1, 1)
    )
    _, events = await recorded(
        [
            (
                "agent/r1",
                [
                    ev.BudgetExceeded(limit="tokens", value=10.0),
                    finished,
                    ev.ApprovalRequested(effect_id="t", question="send it?"),
                    ev.ApprovalDecided(effect_id="t", allowed=False, by="ada"),
                    ev.ContextCompacted(dropped=4),
                    ev.AgentCancelled(reason="enough"),
                ],
            )
        ]
    )
    root: Any = run_tree("r1", events).root
    assert [s.output for s in root.steps] == [
        "budget exceeded: tokens at 10",
        "waits for approval: send it?",
        "refused by ada",
        "context compacted: 4 messages dropped",
    ]
    assert (root.status, root.result) == ("cancelled", "enough")


async def test_a_model_call_is_named_after_the_model_that_answered() -> None:
    asked = ev.ModelCallStarted(call_id="m", model="policy", keep=0, messages=(), tools="", prompt="")
    answered = ev.ModelCallFinished(
        call_id="m", message=Message("assistant", "hi"), finish_reason="stop", model="expert"
    )
    _, events = await recorded([("agent/r1", [asked]), ("agent/r1", [answered])])
    root: Any = run_tree("r1", events).root
    assert [s.name for s in root.steps] == ["expert"]
