"""What the sampler is asked, what it answers, and why it may refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from nexactor.events.errors import NexactorError


class QueueFull(NexactorError):
    """Too many requests wait already: try again later."""


class PromptTooLong(NexactorError):
    """The prompt leaves no room for an answer within the sampler's `max_len`."""


class SamplerClosed(NexactorError):
    """The sampler was stopped before the request was finished."""


class SampleRequest(msgspec.Struct, frozen=True):
    """What to sample. `seed` is any integer (64 bits are used); `temperature` 0 is greedy.

    `stop` are strings at which the answer ends; `max_tokens` is cut to what fits into `max_len`.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Sample(msgspec.Struct, frozen=True):
    """What was sampled.

    `ids` includes the token that ended the answer (an end-of-sequence token: `ended` is true; or the one that
    completed the stop string `stopped_by`). `logprobs` are float32 log-probabilities of `ids` under the policy itself:
    at temperature 1 and before top-p, whatever the request sampled at, since this is what a learner compares
    with. `cached_tokens` counts prompt tokens that were not computed again. `version`: the policy that sampled.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    version: str
    ended: bool = False
    stopped_by: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class SamplerStats(msgspec.Struct, frozen=True):
    """Counters since the start, and what is going on now."""

    waiting: int = 0
    active: int = 0
    slots: int = 0
    requests: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cancelled: int = 0
    decode_steps: int = 0
    prefill_steps: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    compilations: int = 0
    swaps: int = 0
    version: str = ""


class Ticket:
    """A request in the sampler. `future` gives its Sample; cancelling the future gives its slot back
    before the next step. `on_token(id, logprob)` is called in the worker's thread for every sampled token.
    """

    def __init__(self, request: SampleRequest, on_token: Callable[[int, float], None] | None) -> None:
        self.request = request
        self.future: Future[Sample] = Future()
        self.on_token = on_token
