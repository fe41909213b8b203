"""Every event type, with when it is written and by whom.

Bodies are MessagePack maps, so fields can be added without breaking old readers; a change of meaning raises
`SCHEMA` and brings an upcaster. Names are past tense. The envelope (envelope.py) holds id, time and cause.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from nexactor.events.messages import Message, TokenTrace, Usage


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all event bodies."""

    SCHEMA: ClassVar[int] = 1


# ---- actors ---------------------------------------------------------------------------------------------


class ActorActivated(Event, frozen=True):
    """A node took ownership of the actor. First event of every activation; it fences the former owner."""

    node: str
    reason: str = "message"


class MessageReceived(Event, frozen=True):
    """A durable command was taken from the actor's inbox. Written before the actor acts on it."""

    message_id: str
    kind: str
    sender: str = ""
    content: str = ""


class TimerSet(Event, frozen=True):
    """The actor asked for a wake-up at `due_ns` (Unix time)."""

    timer: str
    due_ns: int


class TimerFired(Event, frozen=True):
    """A timer's wake-up reached the actor."""

    timer: str


# ---- runs and agents ------------------------------------------------------------------------------------


class RunStarted(Event, frozen=True):
    """A task was given to a root agent. Written by that agent before anything else it does."""

    task: str
    spec: str
    agent: str
    labels: dict[str, str] = {}


class RunFinished(Event, frozen=True):
    """The root agent ended, in the same append as its AgentFinished, AgentFailed or AgentCancelled."""

    status: str
    result: str = ""


class AgentStarted(Event, frozen=True):
    """An agent got its first input. `spec` is the digest of its AgentSpec (a blob in the log)."""

    name: str
    spec: str
    input: str
    parent: str = ""
    parent_effect: str = ""
    depth: int = 0
    context: dict[str, str] = {}


class AgentFinished(Event, frozen=True):
    """The agent's answer. `reason`: answer, stop_tool or max_iterations."""

    result: str
    reason: str = "answer"


class AgentFailed(Event, frozen=True):
    """The agent cannot go on. `infra` marks failures that say nothing about the policy (never trained on)."""

    error: str
    infra: bool = False


class AgentCancelled(Event, frozen=True):
    """A person or the parent stopped the agent."""

    reason: str = ""


# ---- model calls ----------------------------------------------------------------------------------------


class ModelCallStarted(Event, frozen=True):
    """The agent is about to call a model. Durable before the request is sent.

    `keep` messages are kept from this agent's previous call (its messages followed by its answer), `messages` are
    the new ones, `tools` is the digest of the tool list (a blob), `prompt` the digest of the whole request.
    """

    call_id: str
    model: str
    keep: int
    messages: tuple[Message, ...]
    tools: str
    prompt: str
    params: dict[str, Any] = {}


class ModelCallFinished(Event, frozen=True):
    """The model answered. `tokens` is absent where the endpoint returns no token ids.

    `attempts` counts requests sent; `reattached` is true when the endpoint returned a kept answer.
    """

    call_id: str
    message: Message
    finish_reason: str
    usage: Usage = Usage()
    model: str = ""
    policy_version: str = ""
    tokens: TokenTrace | None = None
    attempts: int = 1
    reattached: bool = False
    duration_ns: int = 0


class ModelCallFailed(Event, frozen=True):
    """The endpoint gave no usable answer after all retries.

    `infra` is false where the policy itself is the cause, as with a conversation that outgrew the model's context.
    """

    call_id: str
    error: str
    attempts: int = 1
    infra: bool = True


class ReasoningStep(Event, frozen=True):
    """A span of thinking, written in bounded chunks as it streams. Opaque spans carry no text."""

    call_id: str
    index: int
    text: str = ""
    visible: bool = True


class ContextCompacted(Event, frozen=True):
    """Earlier messages were replaced in the agent's context; the originals stay in the log."""

    dropped: int
    summary: str = ""


# ---- tools and sub-agents -------------------------------------------------------------------------------


class ToolCallStarted(Event, frozen=True):
    """A tool is about to run. `effect_id` is its idempotency key; `repeat` decides what a recovery may do."""

    effect_id: str
    tool_call_id: str
    name: str
    arguments: str
    repeat: str


class ToolCallFinished(Event, frozen=True):
    """The tool returned. `truncated` counts the characters cut from the result by its output limit."""

    effect_id: str
    tool_call_id: str
    name: str
    result: str
    truncated: int = 0
    attempts: int = 1
    duration_ns: int = 0


class ToolCallFailed(Event, frozen=True):
    """The tool raised, timed out, was refused its arguments, or its outcome is unknown after a crash."""

    effect_id: str
    tool_call_id: str
    name: str
    error: str
    outcome_unknown: bool = False
    attempts: int = 1
    duration_ns: int = 0


class SubAgentStarted(Event, frozen=True):
    """The agent called a sub-agent as a tool. `child` is the new actor's address."""

    effect_id: str
    tool_call_id: str
    name: str
    child: str
    input: str


class SubAgentFinished(Event, frozen=True):
    """The sub-agent's reply reached its parent."""

    effect_id: str
    tool_call_id: str
    name: str
    child: str
    status: str
    result: str


# ---- people and limits ----------------------------------------------------------------------------------


class ApprovalRequested(Event, frozen=True):
    """The agent waits for a person to allow an effect."""

    effect_id: str
    question: str


class ApprovalDecided(Event, frozen=True):
    """A person allowed or refused an effect."""

    effect_id: str
    allowed: bool
    by: str = ""


class BudgetExceeded(Event, frozen=True):
    """A limit of the agent or its tree was reached. `limit` names it."""

    limit: str
    value: float


# ---- annotations and learning ---------------------------------------------------------------------------


class RewardAssigned(Event, frozen=True):
    """A checker, a person or a rescorer gave a run a reward. Goes to `annotation/<run>`, never overwrites."""

    run: str
    reward: float
    source: str
    parts: dict[str, float] = {}
    target: str = ""


class Annotated(Event, frozen=True):
    """Free-form label of a run or of one of its events (`target`)."""

    run: str
    key: str
    value: str
    target: str = ""


class LearnerStep(Event, frozen=True):
    """One gradient step, with the ids of the ModelCallFinished events whose tokens it trained on.

    `cursor` is the log position up to which the learner had read, `metrics` its loss and counts.
    """

    step: int
    events: tuple[str, ...]
    cursor: str
    metrics: dict[str, float] = {}


class PolicyPublished(Event, frozen=True):
    """New weights are ready to serve. `digest` is over the files at `path`."""

    version: str
    path: str
    digest: str
    step: int


class UnknownEvent(Event, frozen=True):
    """An event of a type this code does not know: kept as read, skipped by folds, never fatal."""

    type: str
    body: bytes


EVENT_TYPES: dict[str, type[Event]] = {
    cls.__name__: cls for cls in Event.__subclasses__() if cls is not UnknownEvent
}
