"""The sampler: an engine that decodes many conversations at once on one copy of the weights.

A fixed number of slots, each a row of the key-value cache. One worker thread alternates between a bounded chunk of
prefill and one decode step for all active sequences, so that a long new prompt never starves those that are
answering. A prompt is prefilled except for its last token, which the first decode step feeds: sampling
therefore has one code path. Only tokens that no slot holds yet are computed: the next turn of a conversation goes on
in its slot, a prefix shared with another conversation (a system prompt, the members of a group) is copied, and a
request whose prefix is just being computed for another waits for it.

New weights: requests in flight finish on the weights they began with, new ones start on the new weights at once,
and both are decoded side by side until the old are done. So every answer, ids and log-probabilities, belongs to
exactly one policy version, nothing is dropped and nothing waits; keys and values of old weights are never
reused by a request on new ones.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from nexactor.events.errors import NexactorError
from nexactor.learner.cache import Cache, Dice, Rows, allocate, copy_prefix, decode, prefill, windows
from nexactor.learner.model import Config, Params
from nexactor.learner.sampling import (
    PromptTooLong,
    QueueFull,
    Sample,
    SamplerClosed,
    SampleRequest,
    SamplerStats,
    Ticket,
)
from nexactor.learner.slots import WORTH_COPYING, Active, Ids, Placement, Slot, Weights, common, place

logger = logging.getLogger(__name__)

_TOGETHER = 4
"""Sequences that are prefilled in one batch, when so many wait."""


class Sampler:
    """Continuous batching over `slots` sequences of up to `max_len` tokens (prompt and answer).

    `text` turns ids into text (for stop strings). `chunk` bounds the prompt tokens computed between two decode steps,
    `queue` the requests that wait for a slot. Start it, submit, stop it; all methods may be called from any thread.
    """

    def __init__(
        self,
        params: Params,
        config: Config,
        *,
        text: Callable[[Sequence[int]], str],
        eos_ids: frozenset[int],
        version: str = "",
        slots: int = 16,
        max_len: int = 2048,
        queue: int = 256,
        chunk: int = 128,
    ) -> None:
        if slots < 1 or chunk < 16 or chunk % 4:
            raise NexactorError(
                f"slots is {slots}, chunk {chunk}: give at least 1, and 16 or a larger multiple of 4"
            )
        self.config, self.max_len = config, min(max_len, config.max_positions)
        self._weights = Weights(params, version, 0)
        self._text, self._eos = text, eos_ids
        self._chunk, self._queue_limit = chunk, queue
        positions = self.max_len + chunk
        self._cache: Cache = allocate(config, slots, positions)
        self._slots = [Slot(i, positions) for i in range(slots)]
        self._scratch = slots
        self._windows = windows(positions)
        self._prefill_sizes = {1: (chunk // 4, chunk // 2, chunk), _TOGETHER: (chunk // _TOGETHER,)}
        self._decode_sizes = decode_sizes(slots)
        self._by_row = jax.default_backend() == "cpu"
        self._waiting: collections.deque[tuple[Ticket, Ids, float]] = collections.deque()
        self._prefilling: list[Active] = []
        self._decoding: list[Active] = []
        self._cond = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._to_compile: collections.deque[Callable[[], None]] = collections.deque()
        self._programs: set[tuple[Any, ...]] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = {"decode": 0.0, "prefill": 0.0}
        self.failure: BaseException | None = None

    # ---- from any thread ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the worker after its current step; unfinished requests fail with SamplerClosed."""
        with self._cond:
            self._closed = True
            self._cond.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._abandon(SamplerClosed("the sampler was stopped before it finished this request"))

    def submit(self, request: SampleRequest, on_token: Callable[[int, float], None] | None = None) -> Ticket:
        """Queue a request. Raises PromptTooLong, QueueFull, SamplerClosed, or NexactorError for bad values."""
        prompt = np.asarray(request.prompt, np.int32)
        if not len(prompt):
            raise NexactorError("the prompt is empty: give at least one token")
        if int(prompt.min()) < 0 or int(prompt.max()) >= self.config.vocab:
            raise NexactorError(f"a prompt token lies outside the vocabulary (0 to {self.config.vocab - 1})")
        if request.max_tokens < 1:
            raise NexactorError(f"max_tokens is {request.max_tokens}: it must be at least 1")
        if len(prompt) + 1 > self.max_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and the policy's context is {self.max_len}: "
                "shorten the conversation or start the server with a larger --max-len"
            )
        ticket = Ticket(request, on_token)
        with self._cond:
            if self._closed or self.failure is not None:
                raise SamplerClosed(f"the sampler is not running ({self.failure or 'stopped'})")
            if len(self._waiting) >= self._queue_limit:
                raise QueueFull(f"{len(self._waiting)} requests wait for a slot already: try again later")
            self._waiting.append((ticket, prompt, time.monotonic()))
            self._counts["requests"] += 1
            self._cond.notify()
        return ticket

    def swap(self, params: Params, version: str) -> None:
        """Serve new requests from `params` from now on; those in flight finish on what they began with."""
        with self._cond:
            self._weights = Weights(params, version, self._weights.epoch + 1)
            self._counts["swaps"] += 1

    def stats(self) -> SamplerStats:
        """Counters, without stopping anything."""
        with self._cond:
            return SamplerStats(
                waiting=len(self._waiting),
                active=len(self._prefilling) + len(self._decoding),
                slots=len(self._slots),
                version=self._weights.version,
                compilations=len(self._programs),
                decode_s=self._seconds["decode"],
                prefill_s=self._seconds["prefill"],
                **{
                    n: self._counts[n]
                    for n in (
                        "requests", "sampled_tokens", "prompt_tokens", "cached_tokens", "cancelled",
                        "decode_steps", "prefill_steps", "swaps",
                    )
                },
            )  # fmt: skip

    # ---- the worker ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._cond:
                    while not (self._closed or self._busy or self._to_compile):
                        self._cond.wait()
                    if self._closed:
                        return
                    busy = self._busy
                if busy:
                    self.step()
                else:
                    self._to_compile.popleft()()
        except BaseException as error:
            logger.exception("the sampler failed; requests are refused from now on")
            with self._cond:
                self.failure = error
            failed = SamplerClosed(f"the sampler failed: {error!r}; restart the policy server")
            failed.__cause__ = error
            self._abandon(failed)

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def _abandon(self, error: NexactorError) -> None:
        with self._cond:
            tickets = [t for t, _, _ in self._waiting]
            tickets += [s.ticket for s in (*self._prefilling, *self._decoding)]
            self._waiting.clear()
            self._prefilling, self._decoding = [], []
        for ticket in tickets:
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(error)

    def step(self) -> None:
        """One round: drop what was cancelled, admit, prefill a chunk, decode a token for every active sequence."""
        self._drop_cancelled()
        self._admit()
        if self._prefilling:
            self._prefill_chunk()
        groups: dict[int, list[Active]] = {}
        for sequence in self._decoding:
            groups.setdefault(sequence.weights.epoch, []).append(sequence)
        for group in groups.values():
            self._decode_step(group)

    def _drop_cancelled(self) -> None:
        with self._cond:
            kept = [w for w in self._waiting if not w[0].future.cancelled()]
            left = [s for s in (*self._prefilling, *self._decoding) if s.ticket.future.cancelled()]
            self._counts["cancelled"] += len(self._waiting) - len(kept) + len(left)
            self._waiting = collections.deque(kept)
            for sequence in left:
                self._leave(sequence)

    def _leave(self, sequence: Active) -> None:
        """Give a slot back; what it holds may serve a later request of the same version."""
        for group in (self._prefilling, self._decoding):
            if sequence in group:
                group.remove(sequence)
        sequence.slot.busy = False
        sequence.slot.used = time.monotonic()

    def _admit(self) -> None:
        """Give free slots to waiting requests, first come first served, except that one whose prefix is being
        computed by another waits for that instead of computing it again."""
        with self._cond:
            put_off, weights = [], self._weights
            while self._waiting and any(not s.busy for s in self._slots):
                ticket, prompt, since = self._waiting.popleft()
                placed = place(self._slots, prompt[:-1], weights.epoch)
                coming = [s.prompt[:-1] for s in self._prefilling if s.weights.epoch == weights.epoch]
                soon = max((common(p, prompt[:-1]) for p in coming), default=0)
                if soon >= placed.cached + WORTH_COPYING:
                    put_off.append((ticket, prompt, since))
                    continue
                self._occupy(placed, weights.epoch)
                sequence = Active(ticket, prompt, placed.slot, placed.cached, weights)
                sequence.limit = min(ticket.request.max_tokens, self.max_len - len(prompt))
                now = time.monotonic()
                sequence.times = [now - since, now, now]
                self._counts["prompt_tokens"] += len(prompt)
                self._counts["cached_tokens"] += placed.cached
                (self._prefilling if sequence.remaining else self._decoding).append(sequence)
            self._waiting.extendleft(reversed(put_off))

    def _occupy(self, placed: Placement, epoch: int) -> None:
        slot, source, cached = placed.slot, placed.source, placed.cached
        if source is not None:
            size = next(w for w in self._windows if w >= cached)
            self._programs.add(("copy", size))
            self._cache = copy_prefix(self._cache, np.int32(source.row), np.int32(slot.row), length=size)
            slot.tokens[:cached] = source.tokens[:cached]
        slot.length, slot.epoch, slot.busy = cached, epoch, True

    def _prefill_chunk(self) -> None:
        """Compute up to `chunk` prompt tokens: of four sequences on the same weights if so many wait, else of the
        first."""
        began = time.monotonic()
        first = self._prefilling[0]
        ready = [s for s in self._prefilling if s.weights.epoch == first.weights.epoch][:_TOGETHER]
        if len(ready) < _TOGETHER:
            ready = [first]
        batch = len(ready)
        size = next(n for n in self._prefill_sizes[batch] if n >= min(first.remaining, self._chunk // batch))
        tokens = np.zeros((batch, size), np.int32)
        counts = []
        for i, s in enumerate(ready):
            count = min(size, s.remaining)
            tokens[i, :count] = s.prompt[s.slot.length : s.slot.length + count]
            counts.append(count)
        rows = Rows(tokens, _int32(s.slot.row for s in ready), _int32(s.slot.length for s in ready))
        window = self._window(rows.start)
        self._programs.add(("prefill", batch, size, window))
        self._cache = prefill(first.weights.params, self._cache, rows, config=self.config, window=window)
        self._cache.k.block_until_ready()
        now = time.monotonic()
        with self._cond:
            for i, s in enumerate(ready):
                s.slot.tokens[s.slot.length : s.slot.length + counts[i]] = tokens[i, : counts[i]]
                s.slot.length += counts[i]
                if not s.remaining:
                    s.times[2] = now
                    self._prefilling.remove(s)
                    self._decoding.append(s)
            self._counts["prefill_steps"] += 1
            self._seconds["prefill"] += now - began

    def _decode_step(self, group: list[Active]) -> None:
        """One token for every sequence of a group (all on the same weights)."""
        began = time.monotonic()
        size = next(n for n in self._decode_sizes if n >= len(group))
        pad = size - len(group)
        requests = [s.ticket.request for s in group]
        rows = Rows(
            _int32([*(s.next_token for s in group), *[0] * pad])[:, None],
            _int32([*(s.slot.row for s in group), *[self._scratch] * pad]),
            _int32([*(s.slot.length for s in group), *[0] * pad]),
        )
        dice = Dice(
            np.array([*(s.seed for s in group), *[(0, 0)] * pad], np.uint32),
            np.array([*(r.temperature for r in requests), *[0.0] * pad], np.float32),
            np.array([*(r.top_p for r in requests), *[1.0] * pad], np.float32),
        )
        truncate = any(r.top_p < 1.0 and r.temperature > 0 for r in requests)
        window = self._window(rows.start)
        self._programs.add(("decode", size, window, truncate))
        self._cache, ids, logprobs = decode(
            group[0].weights.params,
            self._cache,
            rows,
            dice,
            config=self.config,
            window=window,
            truncate=truncate,
        )
        new_ids, new_logprobs = np.asarray(ids).tolist(), np.asarray(logprobs).tolist()
        with self._cond:
            self._counts["decode_steps"] += 1
            self._counts["sampled_tokens"] += len(group)
            self._seconds["decode"] += time.monotonic() - began
        for sequence, token, logprob in zip(group, new_ids, new_logprobs, strict=False):
            self._sampled(sequence, token, logprob)

    def _sampled(self, s: Active, token: int, logprob: float) -> None:
        """Take a sampled token in; finish the sequence if it ends it."""
        slot = s.slot
        slot.tokens[slot.length] = s.next_token
        slot.length += 1
        s.next_token = token
        s.ids.append(token)
        s.logprobs.append(logprob)
        if s.ticket.on_token is not None:
            s.ticket.on_token(token, logprob)
        ended = token in self._eos
        stopped_by = "" if ended else self._stop_string(s)
        if not (ended or stopped_by or len(s.ids) >= s.limit):
            return
        with self._cond:
            self._leave(s)
        if not s.ticket.future.set_running_or_notify_cancel():
            return
        queued, admitted, answering = s.times
        s.ticket.future.set_result(
            Sample(
                ids=s.ids,
                logprobs=s.logprobs,
                finish_reason="stop" if ended or stopped_by else "length",
                version=s.weights.version,
                ended=ended,
                stopped_by=stopped_by,
                cached_tokens=s.cached,
                queued_s=queued,
                prefill_s=answering - admitted,
                decode_s=time.monotonic() - answering,
            )
        )

    def _stop_string(self, s: Active) -> str:
        """The stop string that the last token completed, if any: a token adds at least a byte, so looking
        at as many tokens as the string has bytes is enough."""
        for stop in s.ticket.request.stop:
            if stop in self._text(s.ids[-len(stop.encode()) - 4 :]):
                return stop
        return ""

    def _window(self, starts: Ids) -> int | None:
        """The cache positions a batched program must look at; None where each row has its own."""
        if self._by_row:
            return None
        longest = int(starts.max())
        return next(w for w in self._windows if w >= longest)

    def warm_when_idle(self) -> None:
        """Let the worker compile (or fetch from JAX's compilation cache) the programs that most requests need
        while it has nothing else to do: the sampler is ready at once, a request waits for one program at most."""
        for size in self._decode_sizes:
            self._to_compile.append(partial(self._compile_decode, size))
        for batch, sizes in self._prefill_sizes.items():
            for size in sizes:
                self._to_compile.append(partial(self._compile_prefill, batch, size))

    def warm(self) -> None:
        """The same, now; before `start`."""
        self.warm_when_idle()
        while self._to_compile:
            self._to_compile.popleft()()

    def _compile_prefill(self, batch: int, size: int) -> None:
        rows = Rows(np.zeros((batch, size), np.int32), *self._nowhere(batch))
        window = self._window(rows.start)
        self._cache = prefill(self._weights.params, self._cache, rows, config=self.config, window=window)
        self._cache.k.block_until_ready()
        self._programs.add(("prefill", batch, size, window))

    def _compile_decode(self, size: int) -> None:
        rows = Rows(np.zeros((size, 1), np.int32), *self._nowhere(size))
        dice = Dice(np.zeros((size, 2), np.uint32), np.zeros(size, np.float32), np.ones(size, np.float32))
        window = self._window(rows.start)
        self._cache, ids, _ = decode(
            self._weights.params,
            self._cache,
            rows,
            dice,
            config=self.config,
            window=window,
            truncate=False,
        )
        ids.block_until_ready()
        self._programs.add(("decode", size, window, False))

    def _nowhere(self, batch: int) -> tuple[Ids, Ids]:
        """`rows` and `start` of a batch of padding."""
        return _int32([self._scratch] * batch), _int32([0] * batch)


def decode_sizes(slots: int) -> tuple[int, ...]:
    """Batch sizes of a decode step: 4 at least (on CPU one row costs as much as four), then doubling to `slots`."""
    sizes = [4]
    while sizes[-1] < slots:
        sizes.append(min(2 * sizes[-1], slots))
    return tuple(sizes)


def _int32(values: Any) -> Ids:
    return np.fromiter(values, np.int32)
