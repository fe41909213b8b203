"""The agent's state, and `evolve`: how each event changes it. Pure; the log is the only input."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from nexactor.events import types as ev
from nexactor.events.messages import Message, ToolCall
from nexactor.spec import AgentSpec

Status = Literal["new", "running", "finished", "failed", "cancelled"]


class Pending(msgspec.Struct, frozen=True):
    """An effect that started and has no end yet."""

    kind: Literal["model", "tool", "agent"]
    effect_id: str
    tool_call_id: str = ""
    name: str = ""
    arguments: str = ""
    repeat: str = ""
    child: str = ""


class AgentState(msgspec.Struct, frozen=True):
    """Everything `decide` may look at.

    `messages` is the conversation after the system prompt. `calls` are the last answer's tool calls, `results`
    the ends of those that have ended, by tool call id. `asked` counts the messages (system prompt included) that the
    last model call's prompt and answer covered: the next call keeps them. `tokens` are that call's prompt ids
    and sampled ids, uint32 little-endian, where the endpoint gave ids.
    """

    address: str
    spec: AgentSpec
    version: int = 0
    status: Status = "new"
    parent: str = ""
    parent_effect: str = ""
    depth: int = 0
    context: dict[str, str] = {}
    messages: tuple[Message, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    results: dict[str, str] = {}
    pending: dict[str, Pending] = {}
    iterations: int = 0
    children: int = 0
    asked: int = 0
    last_call: str = ""
    tokens: bytes = b""
    answer: str | None = None
    error: str = ""
    infra: bool = True
    stop_result: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "failed", "cancelled")


def render(state: AgentState) -> tuple[Message, ...]:
    """The whole prompt of the next model call. Pure: replay renders it again and compares digests."""
    system = (Message("system", state.spec.system_prompt),) if state.spec.system_prompt else ()
    return system + state.messages


def evolve(state: AgentState, event: ev.Event) -> AgentState:
    """The state after one more event of the agent's stream. Unknown events only count as a version."""
    state = replace(state, version=state.version + 1)
    match event:
        case ev.AgentStarted():
            return replace(
                state,
                status="running",
                parent=event.parent,
                parent_effect=event.parent_effect,
                depth=event.depth,
                context=event.context,
                messages=(Message("user", event.input),),
            )
        case ev.ModelCallStarted():
            return replace(
                state,
                iterations=state.iterations + 1,
                pending={**state.pending, event.call_id: Pending("model", event.call_id)},
            )
        case ev.ModelCallFinished():
            return _answered(state, event)
        case ev.ModelCallFailed():
            return replace(_without(state, event.call_id), error=event.error, infra=event.infra)
        case ev.ToolCallStarted():
            pending = Pending(
                "tool", event.effect_id, event.tool_call_id, event.name, event.arguments, event.repeat
            )
            return replace(state, pending={**state.pending, event.effect_id: pending})
        case ev.SubAgentStarted():
            pending = Pending(
                "agent", event.effect_id, event.tool_call_id, event.name, event.input, child=event.child
            )
            return replace(
                state, children=state.children + 1, pending={**state.pending, event.effect_id: pending}
            )
        case ev.ToolCallFinished():
            ended = _ended(state, event.effect_id, event.tool_call_id, event.result)
            stops = event.name in state.spec.stop_tools
            return replace(ended, stop_result=event.result) if stops else ended
        case ev.ToolCallFailed():
            return _ended(state, event.effect_id, event.tool_call_id, f"error: {event.error}")
        case ev.SubAgentFinished():
            ok = event.status == "finished"
            text = event.result if ok else f"error: {event.name} {event.status}: {event.result}"
            ended = _ended(state, event.effect_id, event.tool_call_id, text)
            stops = ok and event.name in state.spec.stop_tools
            return replace(ended, stop_result=event.result) if stops else ended
        case ev.AgentFinished():
            return replace(state, status="finished", answer=event.result)
        case ev.AgentFailed():
            return replace(state, status="failed", error=event.error, pending={})
        case ev.AgentCancelled():
            return replace(state, status="cancelled", error=event.reason, pending={})
    return state


def _without(state: AgentState, effect_id: str) -> AgentState:
    return replace(state, pending={k: v for k, v in state.pending.items() if k != effect_id})


def _answered(state: AgentState, event: ev.ModelCallFinished) -> AgentState:
    tokens = b""
    if event.tokens is not None:
        t = event.tokens
        tokens = state.tokens[: 4 * t.prompt_keep] + t.prompt_ids + t.ids
    messages = (*state.messages, event.message)
    return replace(
        _without(state, event.call_id),
        messages=messages,
        calls=event.message.tool_calls,
        results={},
        asked=len(render(state)) + 1,
        last_call=event.call_id,
        tokens=tokens,
        answer=None if event.message.tool_calls else event.message.content,
    )


def _ended(state: AgentState, effect_id: str, tool_call_id: str, text: str) -> AgentState:
    """Note a call's result; when the last one of an answer is in, the results join the conversation in call order."""
    results = {**state.results, tool_call_id: text}
    state = replace(_without(state, effect_id), results=results)
    if all(c.id in results for c in state.calls):
        new = tuple(Message("tool", results[c.id], tool_call_id=c.id) for c in state.calls)
        return replace(state, messages=state.messages + new, calls=())
    return state
