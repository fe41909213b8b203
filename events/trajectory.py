"""Trajectories: the token-level view of runs, folded from events and nothing else.

A run is a tree of agents. An agent's model calls form segments: a call continues the segment of the call
before it exactly when its prompt keeps all of that call's tokens (prompt and answer); otherwise somebody
rewrote history (compaction, a template that strips thinking, an edited context) and a new segment starts.
Such splits are counted with their reason; nothing is tokenised again and no call is dropped in silence.

Calls to endpoints that return no token ids form text segments: the messages as they were, for the learner to
tokenise with the policy's own chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from nexactor.events.envelope import Recorded
from nexactor.events.messages import Message
from nexactor.events.segments import (
    AgentTrajectory,
    Reward,
    Segment,
    Span,
    Trajectory,
    decode_ids,
    decode_logprobs,
    encode_ids,
    encode_logprobs,
    to_json,
)
from nexactor.events.types import (
    AgentCancelled,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    ContextCompacted,
    Event,
    ModelCallFailed,
    ModelCallFinished,
    ModelCallStarted,
    RewardAssigned,
    RunFinished,
    RunStarted,
)

__all__ = [
    "TRAJECTORY_TYPES",
    "AgentTrajectory",
    "AssemblerState",
    "Reward",
    "Segment",
    "Span",
    "Trajectory",
    "TrajectoryAssembler",
    "assemble",
    "decode_ids",
    "decode_logprobs",
    "encode_ids",
    "encode_logprobs",
    "to_json",
]

TRAJECTORY_TYPES: tuple[str, ...] = (
    "RunStarted",
    "RunFinished",
    "AgentStarted",
    "AgentFinished",
    "AgentFailed",
    "AgentCancelled",
    "ModelCallStarted",
    "ModelCallFinished",
    "ModelCallFailed",
    "ContextCompacted",
    "RewardAssigned",
)
"""The event types the fold reads; use them as a subscription's filter."""


class _SegmentBuilder:
    """A segment that may still grow."""

    def __init__(self, *, text: bool, tools: str, tokenizer: str, started: str, ids: bytes = b"") -> None:
        self.text, self.tools, self.tokenizer, self.started = text, tools, tokenizer, started
        self.messages: tuple[Message, ...] = ()
        self.ids = bytearray(ids)
        self.logprobs = bytearray(len(ids))
        self.spans: list[Span] = []

    def build(self) -> Segment:
        return Segment(
            messages=self.messages,
            tools=self.tools,
            spans=tuple(self.spans),
            text=self.text,
            ids=bytes(self.ids),
            logprobs=bytes(self.logprobs),
            tokenizer=self.tokenizer,
            started=self.started,
        )


class _Agent:
    """The fold of one agent's stream."""

    def __init__(self, stream: str, parent: str) -> None:
        self.stream, self.parent, self.name, self.depth = stream, parent, "", 0
        self.segments: list[_SegmentBuilder] = []
        self.messages: tuple[Message, ...] = ()
        self.pending: dict[str, ModelCallStarted] = {}
        self.outcome, self.infra = "open", False
        self.calls = self.failed_calls = self.lost_calls = 0
        self.splits: Counter[str] = Counter()
        self.compacted = False
        self.known = True  # whether the tokens of the previous call are known

    def call_started(self, event: ModelCallStarted) -> None:
        if event.keep > len(self.messages):
            self.lost_calls += 1
        self.messages = self.messages[: event.keep] + event.messages
        self.pending[event.call_id] = event

    def call_finished(self, event_id: str, event: ModelCallFinished) -> None:
        self.calls += 1
        started = self.pending.pop(event.call_id, None)
        tools = "" if started is None else started.tools
        prompt = self.messages
        last = self.segments[-1] if self.segments else None
        segment = (
            self._continue_text(last, tools)
            if event.tokens is None
            else self._continue_tokens(last, event, tools)
        )
        self.messages = (*prompt, event.message)
        if segment is None:
            self.lost_calls += 1
            self.known = False
            return
        span_start = len(segment.ids) // 4
        if event.tokens is not None:
            segment.ids += event.tokens.ids
            segment.logprobs += event.tokens.logprobs.ljust(len(event.tokens.ids), b"\0")
        self.known = True
        segment.messages = self.messages
        segment.spans.append(
            Span(
                event=event_id,
                call_id=event.call_id,
                message=len(prompt),
                start=span_start if event.tokens is not None else 0,
                stop=len(segment.ids) // 4,
                policy_version=event.policy_version,
                model=event.model,
                finish_reason=event.finish_reason,
            )
        )

    def _continue_text(self, last: _SegmentBuilder | None, tools: str) -> _SegmentBuilder:
        reason = ""
        if last is None:
            pass
        elif not last.text:
            reason = "no_token_ids"
        elif last.tools != tools:
            reason = "tools_changed"
        elif self.messages[: len(last.messages)] != last.messages:
            reason = "prompt_rewritten"
        return self._reuse_or_start(last, reason, text=True, tools=tools, tokenizer="")

    def _continue_tokens(
        self, last: _SegmentBuilder | None, event: ModelCallFinished, tools: str
    ) -> _SegmentBuilder | None:
        """The segment with this call's prompt in it, or None if the prompt keeps tokens that the log does not have."""
        trace = event.tokens
        assert trace is not None
        have = len(last.ids) // 4 if last is not None and not last.text and self.known else 0
        if trace.prompt_keep > have:
            return None
        reason, head = "", b""
        if last is None:
            pass
        elif last.text:
            reason = "text_before"
        elif not self.known:
            reason = "tokens_missing"
        elif last.tokenizer != trace.tokenizer:
            reason = "tokenizer_changed"
        elif trace.prompt_keep < have:
            reason, head = "prompt_rewritten", bytes(last.ids[: 4 * trace.prompt_keep])
        segment = self._reuse_or_start(
            last, reason, text=False, tools=tools, tokenizer=trace.tokenizer, ids=head
        )
        segment.ids += trace.prompt_ids
        segment.logprobs += bytes(len(trace.prompt_ids))
        return segment

    def _reuse_or_start(
        self,
        last: _SegmentBuilder | None,
        reason: str,
        *,
        text: bool,
        tools: str,
        tokenizer: str,
        ids: bytes = b"",
    ) -> _SegmentBuilder:
        if last is not None and not reason:
            return last
        if reason == "prompt_rewritten" and self.compacted:
            reason = "compacted"
        self.compacted = False
        if reason:
            self.splits[reason] += 1
        self.segments.append(
            _SegmentBuilder(text=text, tools=tools, tokenizer=tokenizer, started=reason, ids=ids)
        )
        return self.segments[-1]

    def build(self) -> AgentTrajectory:
        return AgentTrajectory(
            stream=self.stream,
            parent=self.parent,
            name=self.name,
            segments=tuple(s.build() for s in self.segments),
            outcome=self.outcome,
            infra=self.infra,
            depth=self.depth,
            calls=self.calls,
            failed_calls=self.failed_calls,
            lost_calls=self.lost_calls,
            splits=dict(self.splits),
        )


class _Run:
    """The fold of one run that has not been emitted yet."""

    def __init__(self, run: str, event: RunStarted, root: str, before: int) -> None:
        self.run, self.task, self.labels, self.root = run, event.task, dict(event.labels), root
        self.before = before  # position of the event just before the run's first
        self.status: str | None = None
        self.result = ""
        self.agents: dict[str, _Agent] = {}
        self.rewards: dict[tuple[str, str], Reward] = {}
        self.bytes = 0

    def agent(self, stream: str, parent: str) -> _Agent:
        found = self.agents.get(stream)
        if found is None:
            found = self.agents[stream] = _Agent(stream, parent)
        return found

    def add(self, recorded: Recorded) -> None:
        event, envelope = recorded.event, recorded.envelope
        if isinstance(event, RewardAssigned):
            key = (event.source, event.target)
            self.rewards.pop(key, None)  # so that the newest comes last
            self.rewards[key] = Reward(
                event.reward, event.source, recorded.id, dict(event.parts), event.target
            )
            return
        self.bytes += _size(event)
        if isinstance(event, RunFinished):
            self.status, self.result = event.status, event.result
            return
        agent = self.agent(envelope.stream, envelope.parent)
        match event:
            case AgentStarted():
                agent.name, agent.depth = event.name, event.depth
                agent.parent = event.parent or envelope.parent
            case AgentFinished():
                agent.outcome = "finished"
            case AgentFailed():
                agent.outcome, agent.infra = "failed", event.infra
            case AgentCancelled():
                agent.outcome = "cancelled"
            case ModelCallStarted():
                agent.call_started(event)
            case ModelCallFinished():
                agent.call_finished(recorded.id, event)
            case ModelCallFailed():
                agent.failed_calls += 1
                agent.pending.pop(event.call_id, None)
            case ContextCompacted():
                agent.compacted = True
            case _:
                pass

    @property
    def infra(self) -> bool:
        root = self.agents.get(self.root)
        return root is not None and root.infra

    @property
    def rewarded(self) -> bool:
        return any(not target for _, target in self.rewards)

    def build(self, position: int) -> Trajectory:
        agents = tuple(a.build() for a in self.agents.values())
        return Trajectory(
            run=self.run,
            task=self.task,
            labels=self.labels,
            status=self.status or "",
            result=self.result,
            rewards=tuple(self.rewards.values()),
            agents=agents,
            complete=all(a.outcome != "open" and not a.lost_calls for a in agents),
            infra=self.infra,
            position=position,
        )


def _size(event: Event) -> int:
    """Roughly the bytes that folding an event keeps in memory."""
    if isinstance(event, ModelCallStarted):
        return 200 + sum(len(m.content) + len(m.reasoning) + 200 for m in event.messages)
    if isinstance(event, ModelCallFinished):
        tokens = event.tokens
        held = 0 if tokens is None else 2 * (len(tokens.prompt_ids) + len(tokens.ids))
        return 400 + len(event.message.content) + len(event.message.reasoning) + held
    return 200


class AssemblerState(msgspec.Struct, frozen=True):
    """From where, and past which runs, an assembler goes on after a restart (TrajectoryAssembler.state).

    Events after `cursor` are read again; those up to `seen` were counted before, and `closed` runs among them
    done.
    """

    cursor: int = 0
    seen: int = 0
    closed: tuple[str, ...] = ()
    counts: dict[str, int] = {}


_FRESH = AssemblerState()


class TrajectoryAssembler:
    """Folds the events of many interleaved runs into trajectories, each emitted once, in log order.

    A run is emitted at the event after which it has both its RunFinished and, with `wait_for_reward`, a
    reward for the run as a whole; a run whose root failed for infrastructure reasons does not wait, nobody
    will score it. Rewards that come later are counted as `late_rewards` and otherwise ignored; so are runs
    whose RunStarted lies before the cursor (`headless_events`).

    Memory is bounded: at most `max_runs` runs are tracked, counting open ones and those that closed after the
    oldest open one began, and at most `max_bytes` of event bodies are held. Beyond either limit the oldest
    open run is dropped, counted as `evicted_runs` and never emitted. All of it depends on log order only, so
    an assembler made from `state` and fed the events after `state.cursor` emits exactly what this one would
    have emitted next.
    """

    def __init__(
        self,
        state: AssemblerState = _FRESH,
        *,
        wait_for_reward: bool = True,
        max_runs: int = 4096,
        max_bytes: int = 1 << 30,
    ) -> None:
        self._wait, self._max_runs, self._max_bytes = wait_for_reward, max_runs, max_bytes
        self._seen = state.cursor
        self._open: dict[str, _Run] = {}
        # Closed runs that began after the oldest open one: a restart from the safe cursor meets their events
        # again. The value is the position before their first event; unknown (met before the restart) until
        # seen again.
        self._closed: dict[str, int | None] = dict.fromkeys(state.closed)
        self._bytes = 0
        self._counted_to, self._pruned_to = state.seen, 0
        self.counts: Counter[str] = Counter(state.counts)

    def add(self, recorded: Recorded) -> list[Trajectory]:
        """Fold one event; returns the trajectories it completes (none or one)."""
        before, self._seen = self._seen, recorded.position
        event = recorded.event
        run_id = event.run if isinstance(event, RewardAssigned) else recorded.envelope.run
        if run_id in self._closed:
            if isinstance(event, RunStarted):
                self._closed[run_id] = before
            elif isinstance(event, RewardAssigned):
                self._count("late_rewards", recorded.position)
            return []
        run = self._open.get(run_id)
        if run is None:
            if not isinstance(event, RunStarted):
                late = isinstance(event, RewardAssigned)
                self._count("late_rewards" if late else "headless_events", recorded.position)
                return []
            run = self._open[run_id] = _Run(run_id, event, recorded.stream, before)
        held = run.bytes
        run.add(recorded)
        self._bytes += run.bytes - held
        emitted: list[Trajectory] = []
        if run.status is not None and (run.rewarded or run.infra or not self._wait):
            emitted.append(run.build(recorded.position))
            self._close(run)
            self.counts["runs"] += 1
        while self._open and (
            len(self._open) + len(self._closed) > self._max_runs or self._bytes > self._max_bytes
        ):
            self._close(next(iter(self._open.values())))
            self.counts["evicted_runs"] += 1
        return emitted

    def _count(self, what: str, position: int) -> None:
        if position > self._counted_to:
            self.counts[what] += 1

    def _close(self, run: _Run) -> None:
        del self._open[run.run]
        self._bytes -= run.bytes
        self._closed[run.run] = run.before
        cursor = self.safe_cursor
        if cursor > self._pruned_to:
            self._pruned_to = cursor
            for name in [r for r, b in self._closed.items() if b is not None and b < cursor]:
                del self._closed[name]

    @property
    def safe_cursor(self) -> int:
        """The position before the oldest open run: a restart from it loses nothing."""
        # Runs open in log order and dicts keep insertion order, so the first is the oldest.
        oldest = next(iter(self._open.values()), None)
        return self._seen if oldest is None else oldest.before

    @property
    def open_runs(self) -> int:
        """How many runs are being assembled."""
        return len(self._open)

    @property
    def state(self) -> AssemblerState:
        """What a restart needs; small (run ids only), whatever is in memory."""
        return AssemblerState(self.safe_cursor, self._seen, tuple(self._closed), dict(self.counts))


def assemble(events: Iterable[Recorded], *, wait_for_reward: bool = True) -> list[Trajectory]:
    """All trajectories of a stored sequence of events, in log order."""
    assembler = TrajectoryAssembler(wait_for_reward=wait_for_reward)
    return [t for recorded in events for t in assembler.add(recorded)]
