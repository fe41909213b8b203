"""Replay: fold a run again from its events alone, re-render every prompt, re-decide every step, compare.

Needs the log and nothing else: no model, no tools, no YAML. A divergence is an altered event (the hash chain finds
that first), an altered prompt or spec, or agent code that no longer decides as it did.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

import msgspec

from nexactor.agent.decide import decide, start_events
from nexactor.agent.state import AgentState, evolve
from nexactor.events import types as ev
from nexactor.events.cursor import START
from nexactor.events.envelope import Recorded
from nexactor.events.errors import LogError, NexactorError
from nexactor.events.log import EventLog, Filter
from nexactor.spec import load_stored_spec

_DECISIONS = (
    ev.ModelCallStarted,
    ev.ToolCallStarted,
    ev.SubAgentStarted,
    ev.AgentFinished,
    ev.AgentFailed,
    ev.RunFinished,
)


class Divergence(msgspec.Struct, frozen=True):
    """The first place where a stream and its replay differ, with both sides."""

    stream: str
    version: int
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"{self.stream} version {self.version}:\n  log:    {self.recorded}\n  replay: {self.replayed}"


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay checked. `divergence` is None if everything matched."""

    run: str
    streams: int
    events: int
    prompts: int
    divergence: Divergence | None

    @property
    def ok(self) -> bool:
        return self.divergence is None


async def runs_in(log: EventLog) -> AsyncIterator[str]:
    """The ids of all runs in the log, oldest first."""
    async for recorded in log.subscribe(START, filter=Filter(types=("RunStarted",)), follow=False):
        yield recorded.envelope.run


async def replay_run(log: EventLog, run: str) -> ReplayReport:
    """Replay every agent of a run. Raises LogError if there is no such run; damage is reported as a divergence."""
    streams = await _streams(log, run)
    events = prompts = 0
    ends: dict[str, tuple[str, str, str]] = {}
    children: list[_Child] = []
    divergence: Divergence | None = None
    for stream in streams:
        try:
            recorded = [r async for r in log.read(stream)]
            replayed = await _replay(log, stream, recorded)
        except NexactorError as error:
            divergence = Divergence(stream, 0, str(error), "intact events")
            break
        events += len(recorded)
        prompts += replayed.prompts
        children += replayed.children
        if replayed.state is not None:
            s = replayed.state
            result = (s.answer if s.status == "finished" else s.error) or ""
            ends[stream] = (s.messages[0].content, s.status, result)
        if (divergence := replayed.divergence) is not None:
            break
    return ReplayReport(run, len(streams), events, prompts, divergence or _families_agree(children, ends))


class _Child(msgspec.Struct, frozen=True):
    """A sub-agent as its parent's stream tells it. `status` is empty while its answer is out."""

    parent: str
    version: int
    child: str
    input: str
    status: str = ""
    result: str = ""


class _Replayed(msgspec.Struct, frozen=True):
    divergence: Divergence | None
    prompts: int
    state: AgentState | None
    children: tuple[_Child, ...]


def _families_agree(children: list[_Child], ends: dict[str, tuple[str, str, str]]) -> Divergence | None:
    """What parents say of their children against what the children's own streams say."""
    for c in children:
        said = (c.input, c.status, c.result)
        own = ends.get(c.child)
        if c.status and own is None and c.status == "finished":
            return Divergence(c.parent, c.version, f"{c.child} {c.status}", "the child has no events")
        if c.status and own is not None and own != said:
            return Divergence(c.parent, c.version, f"{c.child}: {said}", f"its own stream: {own}")
    return None


async def _streams(log: EventLog, run: str) -> list[str]:
    """The run's agents: its root, then every child that an intact event names (an index could hide a loss)."""
    streams: list[str] = []
    waiting = deque([f"agent/{run}"])
    while waiting:
        stream = waiting.popleft()
        if await log.version(stream) == 0:
            if not streams:
                raise LogError(f"there is no run {run} in this log (see `nexactor runs`)")
            continue
        streams.append(stream)
        try:
            async for recorded in log.read(stream):
                if isinstance(recorded.event, ev.SubAgentStarted):
                    waiting.append(recorded.event.child)
        except NexactorError:
            continue  # The damage is found again, and reported, when the stream is replayed.
    return streams


async def _replay(log: EventLog, stream: str, events: list[Recorded]) -> _Replayed:
    state: AgentState | None = None
    expected: deque[ev.Event] = deque()
    children: dict[str, _Child] = {}
    tools: set[str] = set()
    prompts = 0

    def diverged(version: int, recorded: str, replayed: str) -> _Replayed:
        return _Replayed(Divergence(stream, version, recorded, replayed), prompts, None, ())

    for recorded in events:
        event = recorded.event
        if state is not None:
            if not expected:
                expected.extend(e for effect in decide(state) for e in start_events(state, effect))
            if expected:
                wanted = expected.popleft()
                if isinstance(event, ev.AgentFailed | ev.AgentCancelled) and not isinstance(
                    wanted, type(event)
                ):
                    expected.clear()  # The node or a person ended the agent before it could do what it would.
                elif wanted != event:
                    return diverged(recorded.version, _show(event), _show(wanted))
            elif (why := _out_of_place(state, event)) is not None:
                return diverged(recorded.version, _show(event), why)
        elif isinstance(event, ev.AgentStarted):
            spec = await load_stored_spec(log, event.spec)
            state = AgentState(stream, spec, version=recorded.version - 1)
        match event:
            case ev.ModelCallStarted():
                prompts += 1
                if event.tools not in tools:
                    await log.get_blob(event.tools)
                    tools.add(event.tools)
            case ev.SubAgentStarted():
                children[event.effect_id] = _Child(stream, recorded.version, event.child, event.input)
            case ev.SubAgentFinished() if event.effect_id in children:
                children[event.effect_id] = msgspec.structs.replace(
                    children[event.effect_id],
                    version=recorded.version,
                    status=event.status,
                    result=event.result,
                )
        if state is not None:
            state = evolve(state, event)
    if state is not None and not expected:
        expected.extend(e for effect in decide(state) for e in start_events(state, effect))
    if expected:
        return diverged(len(events) + 1, "the log ends here", _show(expected[0]))
    return _Replayed(None, prompts, state, tuple(children.values()))


def _out_of_place(state: AgentState, event: ev.Event) -> str | None:
    """Why an event that `decide` did not call for cannot stand where it stands; None if it can."""
    match event:
        case ev.ModelCallFinished() | ev.ModelCallFailed() | ev.ReasoningStep():
            if event.call_id not in state.pending:
                return "no such model call is in flight"
        case ev.ToolCallFinished() | ev.ToolCallFailed() | ev.SubAgentFinished():
            if event.effect_id not in state.pending:
                return "no such effect is in flight"
        case ev.AgentFailed():
            return (
                None
                if event.infra and not state.ended
                else "the agent has ended, or decides its own failures"
            )
        case ev.AgentCancelled():
            return "the agent has ended" if state.ended else None
        case ev.RunFinished():
            if (event.status, event.result) != (state.status, state.error) or state.status == "finished":
                return f"the agent {state.status}: {state.error or state.answer}"
        case _ if isinstance(event, _DECISIONS):
            return "nothing to do here"
    return None


def _show(event: ev.Event, limit: int = 600) -> str:
    text = (
        f"{type(event).__name__} {msgspec.json.encode(event, order='deterministic').decode(errors='replace')}"
    )
    return text if len(text) <= limit else f"{text[:limit]}..."
