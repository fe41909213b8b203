"""Read models that people look at, as pure folds over events: the list of runs, and one run as a tree.

Folds read `agent/…` and `annotation/…` streams; others (learners', say) are not part of a run. Times are Unix
nanoseconds, durations nanoseconds. `index` is an event's rank in its run's total order, 1 for the first: the number
that `show` prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec.structs import replace

from nexactor.events.envelope import Recorded
from nexactor.events.ids import kind_of
from nexactor.events.types import (
    ActorActivated,
    AgentCancelled,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    Annotated,
    ApprovalDecided,
    ApprovalRequested,
    BudgetExceeded,
    ContextCompacted,
    Event,
    ModelCallFailed,
    ModelCallFinished,
    ModelCallStarted,
    RewardAssigned,
    RunFinished,
    RunStarted,
    SubAgentFinished,
    SubAgentStarted,
    ToolCallFailed,
    ToolCallFinished,
    ToolCallStarted,
)

RUN_KINDS = ("agent", "annotation")
"""The kinds of streams whose events belong to runs; use them as a subscription's filter."""


class RunSummary(msgspec.Struct, frozen=True):
    """One line about a run. `status` is starting, running, or as the root agent ended: finished, failed, cancelled.

    `reward` is the newest given to the run as a whole. `ended` is 0 until the run has ended. `takeovers` counts
    activations beyond each actor's first: how often a node had to recover one.
    """

    run: str
    agent: str = ""
    task: str = ""
    labels: dict[str, str] = {}
    status: str = "starting"
    result: str = ""
    started: int = 0
    ended: int = 0
    updated: int = 0
    events: int = 0
    agents: int = 0
    activations: int = 0
    model_calls: int = 0
    model_calls_failed: int = 0
    tool_calls: int = 0
    tool_calls_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reward: float | None = None

    @property
    def takeovers(self) -> int:
        return max(self.activations - self.agents, 0)

    def duration(self, now: int) -> int:
        """Nanoseconds from start to end, or to `now` while it runs; 0 before it started."""
        return (self.ended or now) - self.started if self.started else 0


def summarize(summary: RunSummary, recorded: Recorded) -> RunSummary:
    """The summary of a run after one more of its events."""
    time = recorded.envelope.time
    s = replace(summary, events=summary.events + 1, updated=time)
    match recorded.event:
        case RunStarted(task=task, agent=agent, labels=labels):
            return replace(s, task=task, agent=agent, labels=labels, status="running", started=time)
        case RunFinished(status=status, result=result):
            return replace(s, status=status, result=result, ended=time)
        case ActorActivated():
            return replace(s, activations=s.activations + 1)
        case AgentStarted():
            return replace(s, agents=s.agents + 1)
        case ModelCallFinished(usage=usage):
            return replace(
                s,
                model_calls=s.model_calls + 1,
                prompt_tokens=s.prompt_tokens + usage.prompt_tokens,
                cached_tokens=s.cached_tokens + usage.cached_tokens,
                completion_tokens=s.completion_tokens + usage.completion_tokens,
            )
        case ModelCallFailed():
            return replace(s, model_calls_failed=s.model_calls_failed + 1)
        case ToolCallFinished():
            return replace(s, tool_calls=s.tool_calls + 1)
        case ToolCallFailed():
            return replace(s, tool_calls_failed=s.tool_calls_failed + 1)
        case RewardAssigned(target="", reward=reward):
            return replace(s, reward=reward)
        case _:
            return s


def list_runs(runs: dict[str, RunSummary], recorded: Recorded) -> dict[str, RunSummary]:
    """The run list after one more event, in order of appearance. The dict is the fold's own: it is updated in place."""
    if kind_of(recorded.stream) in RUN_KINDS:
        run = recorded.envelope.run
        runs[run] = summarize(runs.get(run) or RunSummary(run), recorded)
    return runs


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something an agent did, from the event that started it to the one that ended it.

    `name` is the model (as it answered), the tool or the sub-agent; `input` a tool's arguments or a sub-agent's task;
    `output` an answer, a result or an error. `ended` and `end_index` are 0 while it is open. `agent` is the sub-agent's
    own tree. `status` is open, ok, failed or unknown (a tool call whose outcome nobody knows).
    """

    kind: Literal["model", "tool", "agent", "note"]
    index: int
    started: int
    name: str = ""
    input: str = ""
    output: str = ""
    status: str = "open"
    end_index: int = 0
    ended: int = 0
    attempts: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    policy_version: str = ""
    finish_reason: str = ""
    reattached: bool = False
    tool_calls: tuple[str, ...] = ()
    agent: AgentTree | None = None

    @property
    def duration(self) -> int:
        """Nanoseconds from start to end, by the log's times; 0 while open."""
        return self.ended - self.started if self.ended else 0


class AgentTree(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent of a run, with what it did in order; sub-agents hang below the step that called them."""

    stream: str
    name: str
    index: int
    input: str = ""
    status: str = "running"
    result: str = ""
    started: int = 0
    ended: int = 0
    nodes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


class RunTree(msgspec.Struct, frozen=True):
    """A run as a tree. `orphans` are agents whose calling step is not (yet) in the log."""

    summary: RunSummary
    root: AgentTree | None
    rewards: tuple[RewardAssigned, ...] = ()
    annotations: tuple[Annotated, ...] = ()
    orphans: tuple[AgentTree, ...] = ()


def run_tree(run: str, events: Iterable[Recorded]) -> RunTree:
    """Fold all events of one run, in log order, into its tree."""
    summary = RunSummary(run)
    agents: dict[str, _AgentFold] = {}
    rewards: list[RewardAssigned] = []
    annotations: list[Annotated] = []
    for index, recorded in enumerate(events, 1):
        summary = summarize(summary, recorded)
        match recorded.event:
            case RewardAssigned() as reward:
                rewards.append(reward)
            case Annotated() as annotation:
                annotations.append(annotation)
            case event:
                if kind_of(recorded.stream) == "agent":
                    fold = agents.setdefault(recorded.stream, _AgentFold(recorded.stream, index))
                    fold.add(index, recorded.envelope.time, event)
    root = agents.get(f"agent/{run}")
    placed: set[str] = set()
    tree = None if root is None else root.build(agents, placed)
    orphans = tuple(fold.build(agents, placed) for stream, fold in agents.items() if stream not in placed)
    return RunTree(summary, tree, tuple(rewards), tuple(annotations), orphans)


class _AgentFold:
    """One agent's stream so far; steps are kept under the key that their end will name."""

    def __init__(self, stream: str, index: int) -> None:
        self.head = AgentTree(stream=stream, name=stream.rsplit("/", 1)[-1], index=index)
        self.steps: dict[str, Step] = {}
        self.children: dict[str, str] = {}

    def add(self, index: int, time: int, event: Event) -> None:
        match event:
            case ActorActivated(node=node):
                self.head = replace(self.head, nodes=(*self.head.nodes, node))
                if len(self.head.nodes) > 1:
                    self._note(index, time, f"taken over by node {node}")
            case AgentStarted(name=name, input=input):
                self.head = replace(self.head, name=name, input=input, started=time)
            case AgentFinished(result=result):
                self._end_agent("finished", result, time)
            case AgentFailed(error=error):
                self._end_agent("failed", error, time)
            case AgentCancelled(reason=reason):
                self._end_agent("cancelled", reason, time)
            case ModelCallStarted(call_id=key, model=model):
                self.steps[key] = Step("model", index, time, name=model)
            case ToolCallStarted(effect_id=key, name=name, arguments=arguments):
                # A recovery may start the same effect again; its first start keeps its place.
                self.steps.setdefault(key, Step("tool", index, time, name=name, input=arguments))
            case SubAgentStarted(effect_id=key, name=name, input=input, child=child):
                self.steps[key] = Step("agent", index, time, name=name, input=input)
                self.children[key] = child
            case ModelCallFinished(call_id=key, message=message, usage=usage) as finished:
                self._end(
                    key, index, time, "ok", message.content,
                    attempts=finished.attempts,
                    prompt_tokens=usage.prompt_tokens,
                    cached_tokens=usage.cached_tokens,
                    completion_tokens=usage.completion_tokens,
                    policy_version=finished.policy_version,
                    finish_reason=finished.finish_reason,
                    **({"name": finished.model} if finished.model else {}),
                    reattached=finished.reattached,
                    tool_calls=tuple(f"{c.name}({c.arguments})" for c in message.tool_calls),
                )  # fmt: skip
            case ModelCallFailed(call_id=key, error=error, attempts=attempts):
                self._end(key, index, time, "failed", error, attempts=attempts)
            case ToolCallFinished(effect_id=key, result=result, attempts=attempts):
                self._end(key, index, time, "ok", result, attempts=attempts)
            case ToolCallFailed(effect_id=key, name=name, error=error) as failed:
                # Arguments that were refused have an end but no start.
                self.steps.setdefault(key, Step("tool", index, time, name=name))
                status = "unknown" if failed.outcome_unknown else "failed"
                self._end(key, index, time, status, error, attempts=failed.attempts)
            case SubAgentFinished(effect_id=key, status=status, result=result):
                self._end(key, index, time, "ok" if status == "finished" else status, result)
            case ContextCompacted(dropped=dropped):
                self._note(index, time, f"context compacted: {dropped} messages dropped")
            case BudgetExceeded(limit=limit, value=value):
                self._note(index, time, f"budget exceeded: {limit} at {value:g}")
            case ApprovalRequested(question=question):
                self._note(index, time, f"waits for approval: {question}")
            case ApprovalDecided(allowed=allowed, by=by):
                self._note(index, time, f"{'allowed' if allowed else 'refused'} by {by or 'a person'}")
            case _:
                pass

    def _note(self, index: int, time: int, text: str) -> None:
        self.steps[f"note {index}"] = Step("note", index, time, output=text, status="ok")

    def _end_agent(self, status: str, result: str, time: int) -> None:
        self.head = replace(self.head, status=status, result=result, ended=time)

    def _end(self, key: str, index: int, time: int, status: str, output: str, **more: object) -> None:
        step = self.steps.get(key)
        if step is not None:
            self.steps[key] = replace(step, end_index=index, ended=time, status=status, output=output, **more)

    def build(self, agents: dict[str, _AgentFold], placed: set[str]) -> AgentTree:
        placed.add(self.head.stream)
        steps = []
        for key, step in self.steps.items():
            child = self.children.get(key)
            if child in agents and child not in placed:
                step = replace(step, agent=agents[child].build(agents, placed))
            steps.append(step)
        return replace(self.head, steps=tuple(steps))
