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
from nexactor.events.ids import kind_of
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
    for stream in streams:
        try:
            recorded = [r async for r in log.read(stream)]
            divergence, asked = await _replay(log, stream, recorded)
        except NexactorError as error:
            return ReplayReport(
                run, len(streams), events, prompts, Divergence(stream, 0, str(error), "intact events")
            )
        events += len(recorded)
        prompts += asked
        if divergence is not None:
            return ReplayReport(run, len(streams), events, prompts, divergence)
    return ReplayReport(run, len(streams), events, prompts, None)


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


async def _replay(log: EventLog, stream: str, events: list[Recorded]) -> tuple[Divergence | None, int]:
    assert kind_of(stream) == "agent"
    state: AgentState | None = None
    expected: deque[ev.Event] = deque()
    prompts = 0
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
                    return Divergence(stream, recorded.version, _show(event), _show(wanted)), prompts
            elif isinstance(event, _DECISIONS) and not _external(event):
                return Divergence(stream, recorded.version, _show(event), "nothing to do here"), prompts
        elif isinstance(event, ev.AgentStarted):
            spec = await load_stored_spec(log, event.spec)
            state = AgentState(stream, spec, version=recorded.version - 1)
        prompts += isinstance(event, ev.ModelCallStarted)
        if state is not None:
            state = evolve(state, event)
    if state is not None and not expected:
        expected.extend(e for effect in decide(state) for e in start_events(state, effect))
    if expected:
        return Divergence(stream, len(events) + 1, "the log ends here", _show(expected[0])), prompts
    return None, prompts


def _external(event: ev.Event) -> bool:
    """Ends that did not come from `decide`: a failure of the node, or a person's cancellation."""
    return isinstance(event, ev.AgentFailed) or (
        isinstance(event, ev.RunFinished) and event.status in ("failed", "cancelled")
    )


def _show(event: ev.Event, limit: int = 600) -> str:
    text = (
        f"{type(event).__name__} {msgspec.json.encode(event, order='deterministic').decode(errors='replace')}"
    )
    return text if len(text) <= limit else f"{text[:limit]}..."
