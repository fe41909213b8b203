"""From trajectories to training samples: exact ids, and a weight for every token that the loss is taken on.

Only tokens the policy sampled carry weight: tool output, user turns and template tokens never do. Segments
with token ids are used as they are. Text segments (an expert's, say) are rendered with the policy's own chat
template, piece by piece as the policy server would, so that a prompt's ids are the ids that the policy will
meet; they are marked. Everything left out is counted under a name that says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexactor.events.messages import Message, ToolSpec
from nexactor.events.segments import AgentTrajectory, Segment, Span, Trajectory
from nexactor.learner.rules import DataRules


class ChatTokenizer(Protocol):
    """What is needed of a policy's tokenizer (learner/tokenizer.py)."""

    @property
    def name(self) -> str: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, generation: bool) -> str: ...


@dataclass(frozen=True)
class Sample:
    """One branch to train on.

    `ids` int32 [time]; `weights` float32 [time], of each token as a target (0: context only); `logprobs`
    float32 [time], of the sampling policy (0 where not sampled or not known). `events` are the ids of the
    ModelCallFinished events whose answers it trains on. `retokenised` marks samples whose ids did not come
    from the log.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    run: str
    agent: str
    events: tuple[str, ...]
    retokenised: bool = False
    reward: float | None = None
    policy_versions: tuple[str, ...] = ()


@dataclass
class Built:
    """The samples of one trajectory and what was counted on the way; no samples means: not trained on."""

    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def tool_digests(trajectory: Trajectory, tokenizer: str) -> set[str]:
    """Digests of the tool lists that tokenising the trajectory's text takes."""
    return {s.tools for a in trajectory.agents for s in a.segments if s.tools and _needs_text(s, tokenizer)}


def build_samples(
    trajectory: Trajectory,
    rules: DataRules,
    tokenizer: ChatTokenizer,
    tools: Mapping[str, Sequence[ToolSpec]],
) -> Built:
    """Filter a trajectory and make its samples. `tools` maps digests to tool lists (tool_digests says which)."""
    built = Built()
    reason = _refused(trajectory, rules)
    if reason:
        built.counts[reason] += 1
        return built
    for agent in trajectory.agents:
        if agent.infra:
            built.counts["dropped_infra_agents"] += 1
            continue
        built.counts["lost_calls"] += agent.lost_calls
        for why, count in agent.splits.items():
            built.counts[f"split_{why}"] += count
        for segment in agent.segments:
            for sample in _segment_samples(trajectory, agent, segment, tokenizer, tools, built.counts):
                fitted = _fit(sample, rules, built.counts)
                if fitted is not None:
                    built.samples.append(fitted)
    if built.samples:
        built.counts["trajectories"] += 1
        built.counts["samples"] += len(built.samples)
        built.counts["retokenised"] += sum(s.retokenised for s in built.samples)
    else:
        built.counts["dropped_empty"] += 1
    built.counts = +built.counts
    return built


def _refused(trajectory: Trajectory, rules: DataRules) -> str:
    """The count under which the trajectory is left out, or nothing."""
    if any(trajectory.labels.get(k) != v for k, v in rules.labels.items()):
        return "dropped_labels"
    if trajectory.infra:
        return "dropped_infra"
    if rules.statuses and trajectory.status not in rules.statuses:
        return "dropped_status"
    if rules.min_reward is not None and (trajectory.reward is None or trajectory.reward < rules.min_reward):
        return "dropped_reward"
    if rules.incomplete == "drop" and not trajectory.complete:
        return "dropped_incomplete"
    return ""


def _fit(sample: Sample, rules: DataRules, counts: Counter[str]) -> Sample | None:
    """The sample within the length limit, or None if it is dropped."""
    if len(sample.ids) > rules.max_tokens:
        if rules.too_long == "drop":
            counts["dropped_too_long"] += 1
            return None
        counts["cut"] += 1
        n = rules.max_tokens
        sample = Sample(
            ids=sample.ids[:n],
            weights=sample.weights[:n],
            logprobs=sample.logprobs[:n],
            run=sample.run,
            agent=sample.agent,
            events=sample.events,
            retokenised=sample.retokenised,
            reward=sample.reward,
            policy_versions=sample.policy_versions,
        )
    if not sample.weights[1:].any():
        counts["dropped_untrained"] += 1
        return None
    return sample


def _needs_text(segment: Segment, tokenizer: str) -> bool:
    """Whether a segment's own ids are missing, or another tokenizer's."""
    return segment.text or bool(segment.tokenizer and segment.tokenizer != tokenizer)


def _segment_samples(
    trajectory: Trajectory,
    agent: AgentTrajectory,
    segment: Segment,
    tokenizer: ChatTokenizer,
    tools: Mapping[str, Sequence[ToolSpec]],
    counts: Counter[str],
) -> list[Sample]:
    if _needs_text(segment, tokenizer.name):
        if not segment.text:
            counts["other_tokenizer"] += 1
        listed = tools[segment.tools] if segment.tools else ()
        branches = _tokenise(segment, tokenizer, listed, counts)
        retokenised = True
    else:
        ids = np.frombuffer(segment.ids, "<u4").astype(np.int32)
        weights = np.frombuffer(segment.mask, np.uint8).astype(np.float32)
        logprobs = np.frombuffer(segment.logprobs, "<f4").astype(np.float32)
        branches = [_Branch(ids, weights, logprobs, list(segment.spans))]
        retokenised = False
    return [
        Sample(
            ids=b.ids,
            weights=b.weights,
            logprobs=b.logprobs,
            run=trajectory.run,
            agent=agent.stream,
            events=tuple(s.event for s in b.spans),
            retokenised=retokenised,
            reward=trajectory.reward,
            policy_versions=tuple(dict.fromkeys(s.policy_version for s in b.spans)),
        )
        for b in branches
    ]


@dataclass(frozen=True)
class _Branch:
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    spans: list[Span]


def _tokenise(
    segment: Segment, tokenizer: ChatTokenizer, tools: Sequence[ToolSpec], counts: Counter[str]
) -> list[_Branch]:
    """A text segment's branches: one, or more where the template rewrites what it said of earlier turns."""
    ends = [tokenizer.decode([i]) for i in sorted(tokenizer.eos_ids)]
    branches: list[_Branch] = []
    text, ids, weights, spans = "", list[int](), list[float](), list[Span]()

    def close() -> None:
        nonlocal text, ids, weights, spans
        if spans:
            floats = np.array(weights, np.float32)
            branches.append(_Branch(np.array(ids, np.int32), floats, np.zeros_like(floats), spans))
        text, ids, weights, spans = "", [], [], []

    for span in segment.spans:
        prompt = tokenizer.render(segment.messages[: span.message], tools, generation=True)
        answered = tokenizer.render(segment.messages[: span.message + 1], tools, generation=False)
        if not answered.startswith(prompt):
            # The template treats the answer as something other than a continuation of its prompt.
            counts["template_hides_answer"] += 1
            close()
            continue
        if not prompt.startswith(text):
            counts["template_rewrites"] += 1
            close()
        context = tokenizer.encode(prompt[len(text) :])
        answer = _until_end(answered[len(prompt) :], ends)
        sampled = tokenizer.encode(answer)
        # An answer cut by its length limit was not ended by the one who wrote it: its end is not to be
        # learnt.
        trained = len(sampled) - (
            span.finish_reason == "length" and sampled[-1:] != [] and sampled[-1] in tokenizer.eos_ids
        )
        ids += context + sampled
        weights += [0.0] * len(context) + [1.0] * trained + [0.0] * (len(sampled) - trained)
        spans.append(span)
        text = prompt + answer
    close()
    return branches


def _until_end(answer: str, ends: Sequence[str]) -> str:
    """The answer up to and including its end token; what a template adds after that is not the policy's."""
    found = [answer.index(e) + len(e) for e in ends if e and e in answer]
    return answer[: min(found)] if found else answer
