"""Samples: the policy's own tokens carry weight, nothing else does, and whatever is left out is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.events.segments import (
    AgentTrajectory,
    Reward,
    Segment,
    Span,
    Trajectory,
    encode_ids,
    encode_logprobs,
)
from nexactor.learner.data import Built, build_samples, tool_digests
from nexactor.learner.rules import DataRules
from nexactor.learner.tiny import tiny_tokenizer
from nexactor.learner.tokenizer import PolicyTokenizer

TOOLS = {"d": (ToolSpec("add", "Add numbers.", {"type": "object", "properties": {"a": {}}}),)}


@pytest.fixture(scope="module")
def tokenizer() -> PolicyTokenizer:
    return tiny_tokenizer()


def a_run(*segments: Segment, **changes: Any) -> Trajectory:
    values: dict[str, Any] = {
        "run": "r1",
        "task": "t",
        "labels": {"split": "train"},
        "status": "finished",
        "result": "",
        "rewards": (Reward(1.0, "check", "e"),),
        "agents": (AgentTrajectory("agent/r1", "", "root", segments, "finished"),),
        "complete": True,
        "infra": False,
        "position": 9,
    }
    return Trajectory(**{**values, **changes})


def tokens(ids: list[int], spans: list[tuple[int, int]], tokenizer: str = "") -> Segment:
    return Segment(
        messages=(Message("user", "u"), Message("assistant", "a")),
        tools="",
        spans=tuple(Span(f"e{i}", f"c{i}", 1, a, b, "v1") for i, (a, b) in enumerate(spans)),
        ids=encode_ids(ids),
        logprobs=encode_logprobs([-1.0] * len(ids)),
        tokenizer=tokenizer,
    )


CALL = Message("assistant", "", (ToolCall("c", "add", '{"a": 17}'),))
TEXT = Segment(
    messages=(
        Message("system", "You add."),
        Message("user", "17 and 25?"),
        CALL,
        Message("tool", "42", tool_call_id="c"),
        Message("assistant", "It is 42."),
    ),
    tools="d",
    spans=(Span("e1", "c1", 2, finish_reason="tool_calls"), Span("e2", "c2", 4, finish_reason="stop")),
    text=True,
)


def build(trajectory: Trajectory, tokenizer: PolicyTokenizer, **rules: Any) -> Built:
    return build_samples(trajectory, DataRules(**rules), tokenizer, TOOLS)


def trained(built: Built, tokenizer: PolicyTokenizer) -> list[str]:
    """The texts of the runs of tokens that carry weight."""
    out = []
    for sample in built.samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.weights > 0, [0]])))
        out += [tokenizer.decode(sample.ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]
    return out


def test_ids_in_the_log_are_taken_as_they_are(tokenizer: PolicyTokenizer) -> None:
    (sample,) = build(a_run(tokens([5, 6, 7, 8, 9], [(2, 3), (4, 5)])), tokenizer).samples
    assert sample.ids.tolist() == [5, 6, 7, 8, 9]
    assert sample.weights.tolist() == [0, 0, 1, 0, 1]
    assert sample.events == ("e0", "e1")
    assert sample.policy_versions == ("v1",)
    assert not sample.retokenised


def test_of_a_text_segment_only_the_answers_and_their_end_tokens_are_trained_on(
    tokenizer: PolicyTokenizer,
) -> None:
    built = build(a_run(TEXT), tokenizer)
    call = '<tool_call>{"name": "add", "arguments": {"a": 17}}</tool_call>'
    assert trained(built, tokenizer) == [call + "<|im_end|>", "It is 42.<|im_end|>"]
    assert built.samples[0].retokenised
    assert built.counts["retokenised"] == 1


def test_a_text_segment_becomes_the_text_that_the_template_gives(tokenizer: PolicyTokenizer) -> None:
    (sample,) = build(a_run(TEXT), tokenizer).samples
    whole = tokenizer.render(TEXT.messages, TOOLS["d"], generation=False)
    assert tokenizer.decode(sample.ids.tolist()) == whole.rstrip("\n")


def test_a_prompt_in_a_text_segment_has_the_ids_that_the_server_would_give_it(
    tokenizer: PolicyTokenizer,
) -> None:
    (sample,) = build(a_run(TEXT), tokenizer).samples
    prompt = tokenizer.encode(tokenizer.render(TEXT.messages[:2], TOOLS["d"], generation=True))
    assert sample.ids[: len(prompt)].tolist() == prompt
    follow = tokenizer.encode(
        tokenizer.continuation(TEXT.messages[:3], TEXT.messages[3:4], TOOLS["d"], ended=True)
    )
    answered = len(prompt) + int(np.flatnonzero(sample.weights[len(prompt) :] == 0)[0])
    assert sample.ids[answered : answered + len(follow)].tolist() == follow


def test_the_end_of_an_answer_cut_by_its_length_limit_is_not_learnt(tokenizer: PolicyTokenizer) -> None:
    cut = Segment(TEXT.messages[:3], "d", (Span("e1", "c1", 2, finish_reason="length"),), text=True)
    (text,) = trained(build(a_run(cut), tokenizer), tokenizer)
    assert text.endswith("</tool_call>")


def test_ids_of_another_tokenizer_are_not_trusted(tokenizer: PolicyTokenizer) -> None:
    built = build(a_run(tokens([5, 6, 7], [(2, 3)], "other")), tokenizer)
    assert built.samples[0].retokenised
    assert built.counts["other_tokenizer"] == 1


def test_only_text_needs_tool_lists(tokenizer: PolicyTokenizer) -> None:
    assert tool_digests(a_run(TEXT, tokens([1, 2], [(1, 2)])), tokenizer.name) == {"d"}


class Forgetful:
    """A template that strips what earlier answers said, as reasoning templates do."""

    def __init__(self, inner: PolicyTokenizer) -> None:
        self._inner = inner

    def render(self, messages: Any, tools: Any, *, generation: bool) -> str:
        last = len(messages) - 1
        kept = [
            Message("assistant", "-") if m.role == "assistant" and i != last else m
            for i, m in enumerate(messages)
        ]
        return self._inner.render(kept, tools, generation=generation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_where_the_template_rewrites_earlier_turns_each_answer_is_a_branch(
    tokenizer: PolicyTokenizer,
) -> None:
    built = build_samples(a_run(TEXT), DataRules(), Forgetful(tokenizer), TOOLS)  # type: ignore[arg-type]
    assert built.counts["template_rewrites"] == 1
    assert [s.events for s in built.samples] == [("e1",), ("e2",)]
    assert len(trained(built, tokenizer)) == 2


@pytest.mark.parametrize(
    ("changes", "rules", "count"),
    [
        ({"labels": {"split": "test"}}, {"labels": {"split": "train"}}, "dropped_labels"),
        ({"infra": True}, {}, "dropped_infra"),
        ({"status": "failed"}, {"statuses": ("finished",)}, "dropped_status"),
        ({"rewards": ()}, {"min_reward": 0.5}, "dropped_reward"),
        ({"rewards": (Reward(0.4, "check", "e"),)}, {"min_reward": 0.5}, "dropped_reward"),
        ({"complete": False}, {"incomplete": "drop"}, "dropped_incomplete"),
        ({}, {"max_tokens": 4}, "dropped_too_long"),
    ],
)
def test_what_the_rules_leave_out_is_counted(
    tokenizer: PolicyTokenizer, changes: dict[str, Any], rules: dict[str, Any], count: str
) -> None:
    trajectory = a_run(tokens([5, 6, 7, 8, 9], [(2, 3)]), **changes)
    built = build(trajectory, tokenizer, **rules)
    assert built.samples == []
    assert built.counts[count] == 1


def test_a_long_sample_can_be_cut_at_its_end(tokenizer: PolicyTokenizer) -> None:
    built = build(a_run(tokens([5, 6, 7, 8, 9], [(2, 3), (4, 5)])), tokenizer, max_tokens=4, too_long="cut")
    assert built.samples[0].weights.tolist() == [0, 0, 1, 0]
    assert built.counts["cut"] == 1


def test_a_cut_that_leaves_nothing_to_train_on_drops_the_sample(tokenizer: PolicyTokenizer) -> None:
    built = build(a_run(tokens([5, 6, 7, 8, 9], [(4, 5)])), tokenizer, max_tokens=4, too_long="cut")
    assert built.samples == []
    assert built.counts["dropped_untrained"] == 1
    assert built.counts["dropped_empty"] == 1


def test_splits_and_lost_calls_of_the_run_are_counted(tokenizer: PolicyTokenizer) -> None:
    agent = AgentTrajectory(
        "agent/r1", "", "root", (tokens([5, 6], [(1, 2)]),), "finished", lost_calls=2, splits={"compacted": 1}
    )
    built = build(a_run(agents=(agent,)), tokenizer)
    assert built.counts["split_compacted"] == 1
    assert built.counts["lost_calls"] == 2


def test_a_sub_agent_that_failed_for_infrastructure_reasons_is_left_out(tokenizer: PolicyTokenizer) -> None:
    segment = tokens([5, 6], [(1, 2)])
    root = AgentTrajectory("agent/r1", "", "root", (segment,), "finished")
    child = AgentTrajectory("agent/r1/w", "agent/r1", "w", (segment,), "failed", infra=True)
    built = build(a_run(agents=(root, child)), tokenizer)
    assert [s.agent for s in built.samples] == ["agent/r1"]
    assert built.counts["dropped_infra_agents"] == 1
