"""`decide`: what the agent does next, as effects, from its state alone. No clock, no randomness, no I/O."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from nexactor.agent.state import AgentState, evolve, render
from nexactor.events import types as ev
from nexactor.events.ids import digest, kind_of, run_of
from nexactor.events.messages import Message, ToolCall

MAX_DEPTH = 8
"""Sub-agents below sub-agents, at most: a guard against a tree that never ends."""


class CallModel(msgspec.Struct, frozen=True):
    """Ask the model. `messages` is the whole prompt, of which `keep` were in the previous call."""

    effect_id: str
    messages: tuple[Message, ...]
    keep: int
    tools: str
    prompt: str


class CallTool(msgspec.Struct, frozen=True):
    """Run a tool, or refuse a call that cannot be run (an unknown name, say) with an error the model reads."""

    effect_id: str
    call: ToolCall
    repeat: str


class CallAgent(msgspec.Struct, frozen=True):
    """Hand a task to a sub-agent."""

    effect_id: str
    call: ToolCall
    child: str
    spec: str
    input: str


class Finish(msgspec.Struct, frozen=True):
    """The agent is done."""

    result: str
    reason: str


class Fail(msgspec.Struct, frozen=True):
    """The agent cannot go on."""

    error: str
    infra: bool


Effect = CallModel | CallTool | CallAgent | Finish | Fail


def decide(state: AgentState) -> tuple[Effect, ...]:
    """The effects to start now; empty while the agent waits for one in flight, or has ended."""
    if state.status != "running" or state.pending:
        return ()
    if state.error:
        return (Fail(state.error, state.infra),)
    if state.stop_result is not None:
        return (Finish(state.stop_result, "stop_tool"),)
    if state.calls:
        return _calls(state)
    if state.answer is not None:
        return (Finish(state.answer, "answer"),)
    if state.iterations >= state.spec.max_iterations:
        return (Finish(_last_words(state), "max_iterations"),)
    messages = render(state)
    tools = digest(state.spec.tool_specs)
    prompt = digest([state.spec.llm.model, state.spec.llm.params, messages, tools])
    return (CallModel(f"{state.address}@{state.version}.0", messages, state.asked, tools, prompt),)


def start_events(state: AgentState, effect: Effect) -> tuple[ev.Event, ...]:
    """The events that make an effect durable before it starts; for Finish and Fail, the effect itself."""
    match effect:
        case CallModel():
            return (
                ev.ModelCallStarted(
                    call_id=effect.effect_id,
                    model=state.spec.llm.model,
                    keep=effect.keep,
                    messages=effect.messages[effect.keep :],
                    tools=effect.tools,
                    prompt=effect.prompt,
                    params=state.spec.llm.params,
                ),
            )
        case CallTool():
            c = effect.call
            return (
                ev.ToolCallStarted(
                    effect_id=effect.effect_id,
                    tool_call_id=c.id,
                    name=c.name,
                    arguments=c.arguments,
                    repeat=effect.repeat,
                ),
            )
        case CallAgent():
            return (
                ev.SubAgentStarted(
                    effect_id=effect.effect_id,
                    tool_call_id=effect.call.id,
                    name=effect.call.name,
                    child=effect.child,
                    input=effect.input,
                ),
            )
        case Finish():
            end: ev.Event = ev.AgentFinished(result=effect.result, reason=effect.reason)
            return (end, *_run_end(state, "finished", effect.result))
        case Fail():
            end = ev.AgentFailed(error=effect.error, infra=effect.infra)
            return (end, *_run_end(state, "failed", effect.error))


def _run_end(state: AgentState, status: str, result: str) -> tuple[ev.Event, ...]:
    return () if state.parent else (ev.RunFinished(status=status, result=result),)


def _calls(state: AgentState) -> tuple[Effect, ...]:
    """One effect a call of the last answer. Children are numbered in the order in which the agent calls them."""
    effects: list[Effect] = []
    children = state.children
    for ordinal, call in enumerate(state.calls):
        effect = _call(state, ordinal, call, children + 1)
        children += isinstance(effect, CallAgent)
        effects.append(effect)
    return tuple(effects)


def _call(state: AgentState, ordinal: int, call: ToolCall, child_number: int) -> Effect:
    effect_id = f"{state.address}@{state.version}.{ordinal}"
    for sub in state.spec.sub_agents:
        if sub.name == call.name:
            message = _message_of(call)
            if message is None or state.depth + 1 > MAX_DEPTH:
                break
            child = _child(state.address, f"{sub.name}-{child_number}")
            return CallAgent(effect_id, call, child, sub.spec, message)
    repeat = next((t.repeat for t in state.spec.tools if t.spec.name == call.name), "safe")
    return CallTool(effect_id, call, repeat)


def _message_of(call: ToolCall) -> str | None:
    try:
        value: Any = json.loads(call.arguments or "{}")
    except ValueError:
        return None
    message = value.get("message") if isinstance(value, dict) and len(value) == 1 else None
    return message if isinstance(message, str) else None


def _child(parent: str, name: str) -> str:
    """`agent/r1` + worker-1 -> `agent/r1/worker-1`; below that, names are joined with dots."""
    rest = parent.split("/", 2)[2:]
    return f"{kind_of(parent)}/{run_of(parent)}/{'.'.join((*rest, name))}"


def _last_words(state: AgentState) -> str:
    """The text of the last answer, for an agent that ran out of iterations."""
    return next((m.content for m in reversed(state.messages) if m.role == "assistant"), "")


def advance(
    state: AgentState, events: tuple[ev.Event, ...]
) -> tuple[tuple[ev.Event, ...], tuple[Effect, ...]]:
    """One step of the functional core: fold `events`, decide, and say what must be appended.

    Returns (all events of the step: the given ones, then those that start the decided effects; the effects).
    """
    for event in events:
        state = evolve(state, event)
    effects = decide(state)
    started = tuple(e for effect in effects for e in start_events(state, effect))
    return (*events, *started), effects
