"""What a trajectory is: agents of a run, their segments of tokens, the spans that the policy sampled.

Plain data with its JSON form. trajectory.py folds events into it; the learner and exporters read it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any

import msgspec

from nexactor.events.messages import Message


class Span(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer within a segment: tokens [start, stop) were sampled by `policy_version`.

    `event` is the id of the ModelCallFinished, `message` the answer's index in the segment's messages. In a
    text segment `start` and `stop` are 0: there are no tokens yet.
    """

    event: str
    call_id: str
    message: int
    start: int = 0
    stop: int = 0
    policy_version: str = ""
    model: str = ""
    finish_reason: str = ""


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """Model calls of one agent whose prompts extend each other.

    `ids` are little-endian uint32, `logprobs` little-endian float32 of the same count: those of the sampling
    policy inside `spans`, 0 elsewhere. `messages` end with the last answer; `tools` is the digest of the tool
    list (a blob). `text` marks a segment without token ids. `started` says why it is not one with the segment
    before it.
    """

    messages: tuple[Message, ...]
    tools: str
    spans: tuple[Span, ...]
    text: bool = False
    ids: bytes = b""
    logprobs: bytes = b""
    tokenizer: str = ""
    started: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens the segment has; 0 for a text segment."""
        return len(self.ids) // 4

    @property
    def mask(self) -> bytes:
        """One byte a token: 1 where the policy sampled it in this segment, else 0."""
        mask = bytearray(self.tokens)
        for span in self.spans:
            mask[span.start : span.stop] = b"\1" * (span.stop - span.start)
        return bytes(mask)


class AgentTrajectory(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent of the run. `parent` is the calling agent's stream; `outcome` is finished, failed, cancelled
    or open.

    `splits` counts why segments started anew; `lost_calls` counts calls whose prompt cannot be rebuilt from
    the log.
    """

    stream: str
    parent: str
    name: str
    segments: tuple[Segment, ...]
    outcome: str = "open"
    infra: bool = False
    depth: int = 0
    calls: int = 0
    failed_calls: int = 0
    lost_calls: int = 0
    splits: dict[str, int] = {}


class Reward(msgspec.Struct, frozen=True, omit_defaults=True):
    """The newest reward of one source for one target (empty: the whole run)."""

    value: float
    source: str
    event: str
    parts: dict[str, float] = {}
    target: str = ""


class Trajectory(msgspec.Struct, frozen=True, omit_defaults=True):
    """A finished run at the token level: a tree of agents, its labels, its outcome and its rewards.

    `complete` is false where an agent has no end or a call could not be rebuilt. `infra` marks runs that
    failed for reasons that say nothing about the policy. `position` is that of the event which completed the
    trajectory.
    """

    run: str
    task: str
    labels: dict[str, str]
    status: str
    result: str
    rewards: tuple[Reward, ...]
    agents: tuple[AgentTrajectory, ...]
    complete: bool
    infra: bool
    position: int

    @property
    def reward(self) -> float | None:
        """The newest reward given to the run as a whole, by any source."""
        values = [r.value for r in self.rewards if not r.target]
        return values[-1] if values else None

    def reward_by(self, source: str) -> float | None:
        """The newest reward `source` gave the run as a whole."""
        values = [r.value for r in self.rewards if not r.target and r.source == source]
        return values[-1] if values else None


def decode_ids(data: bytes) -> list[int]:
    """Token ids from their stored bytes (little-endian uint32)."""
    return _decode("I", data)


def decode_logprobs(data: bytes) -> list[float]:
    """Log-probabilities from their stored bytes (little-endian float32)."""
    return _decode("f", data)


def encode_ids(ids: Iterable[int]) -> bytes:
    """Token ids as stored bytes (little-endian uint32)."""
    return _encode("I", ids)


def encode_logprobs(logprobs: Iterable[float]) -> bytes:
    """Log-probabilities as stored bytes (little-endian float32)."""
    return _encode("f", logprobs)


def _decode(kind: str, data: bytes) -> list[Any]:
    values = array(kind)
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _encode(kind: str, items: Iterable[Any]) -> bytes:
    values = array(kind, items)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def to_json(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as JSON values: token ids, mask and log-probabilities as lists, messages as in a chat API."""
    value: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(trajectory, agents=()), str_keys=True)
    value["reward"] = trajectory.reward
    value["agents"] = [
        {
            **msgspec.to_builtins(msgspec.structs.replace(agent, segments=())),
            "segments": [_segment_json(s) for s in agent.segments],
        }
        for agent in trajectory.agents
    ]
    return value


def _segment_json(segment: Segment) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(segment, ids=b"", logprobs=b""))
    if not segment.text:
        value["ids"] = decode_ids(segment.ids)
        value["mask"] = list(segment.mask)
        value["logprobs"] = [round(p, 6) for p in decode_logprobs(segment.logprobs)]
    return value
