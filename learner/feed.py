"""The order of batches: from the log's order only, so that a restarted learner meets the same batches.

A feed reads trajectories as they complete, keeps those that the rules accept, and cuts them into batches of N
runs. A window of batches can be trained on more than once; where that ends and how it is shuffled depends on
the log and the seed alone. Every batch knows the place after it, and a feed made from that place yields what
would have come next.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from nexactor.events.cursor import Cursor
from nexactor.events.errors import LogUnavailable
from nexactor.events.log import EventLog, Filter
from nexactor.events.messages import ToolSpec
from nexactor.events.segments import Trajectory
from nexactor.events.trajectory import TRAJECTORY_TYPES, AssemblerState, TrajectoryAssembler
from nexactor.learner.checkpoint import Place
from nexactor.learner.config import LearnerConfig
from nexactor.learner.data import ChatTokenizer, Sample, build_samples, tool_digests

logger = logging.getLogger(__name__)
T = TypeVar("T")

_READ = Filter(kinds=("agent", "annotation"), types=TRAJECTORY_TYPES)
RETRY = 1.0
"""Seconds before the log is asked again after it did not answer."""


@dataclass(frozen=True)
class Accepted:
    """A trajectory that is trained on: its samples, the assembler's state and the feed's counts after it."""

    run: str
    reward: float | None
    samples: tuple[Sample, ...]
    log: AssemblerState
    counts: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    `place` is after this step, `cursor` how far the log had been read, `counts` what was read, split and left
    out by then.
    """

    runs: tuple[Accepted, ...]
    epoch: int
    place: Place
    cursor: str
    counts: dict[str, int]

    @property
    def samples(self) -> list[Sample]:
        return [s for r in self.runs for s in r.samples]

    @property
    def events(self) -> tuple[str, ...]:
        """Ids of the ModelCallFinished events trained on, in the order of the batch."""
        return tuple(dict.fromkeys(e for s in self.samples for e in s.events))


class Feed:
    """Batches from the log, from a place on."""

    def __init__(
        self,
        log: EventLog,
        config: LearnerConfig,
        tokenizer: ChatTokenizer,
        place: Place,
    ) -> None:
        self._log, self._config, self._tokenizer, self._place = log, config, tokenizer, place
        self._tools: dict[str, Sequence[ToolSpec]] = {}
        self._counts = Counter(place.counts)

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Batches after the place this feed was made with; ends only if there is an `until` or no `follow`."""
        size = self._config.batch
        # A window is only remembered if it is used again.
        width = self._config.window if self._config.epochs > 1 else 1
        place = self._place
        async with aclosing(self._accepted()) as runs:
            async for batch in self._windows(runs, size, width, place):
                yield batch

    async def _windows(
        self, runs: AsyncIterator[Accepted], size: int, width: int, place: Place
    ) -> AsyncGenerator[Batch, None]:
        ended = False
        while not ended:
            window: list[Accepted] = []
            for index in range(width):
                batch = await _take(runs, size)
                ended = len(batch) < size
                window += batch
                last = self._config.epochs == 1 and (ended or index == width - 1)
                if batch and index >= place.done:
                    yield self._batch(batch, place, 0, index + 1, window if last else None)
                if ended:
                    break
            steps = -(-len(window) // size)
            for epoch in range(1, self._config.epochs):
                order = np.random.default_rng([self._config.seed, place.window, epoch]).permutation(
                    len(window)
                )
                for index in range(steps):
                    done = epoch * steps + index + 1
                    if done <= place.done:
                        continue
                    chosen = [window[i] for i in order[index * size : (index + 1) * size]]
                    yield self._batch(
                        chosen, place, epoch, done, window if done == self._config.epochs * steps else None
                    )
            if window:
                place = _after(window, place)

    def _batch(
        self, runs: list[Accepted], place: Place, epoch: int, done: int, finished: list[Accepted] | None
    ) -> Batch:
        """A batch whose place is within the window, or at the start of the next if it `finished` this one."""
        after = msgspec.structs.replace(place, done=done) if finished is None else _after(finished, place)
        newest = max(runs, key=lambda run: run.log.seen)
        counts = {**newest.counts, **newest.log.counts}
        return Batch(tuple(runs), epoch, after, str(Cursor((newest.log.seen,))), counts)

    async def _accepted(self) -> AsyncGenerator[Accepted, None]:
        state, until = self._place.log, self._place.until
        assembler = TrajectoryAssembler(
            state, wait_for_reward=self._config.wait_for_reward, max_runs=self._config.max_open_runs
        )
        seen = state.cursor
        while True:
            try:
                stored = self._log.subscribe(Cursor((seen,)), filter=_READ, follow=self._config.follow)
                async with aclosing(stored) as events:
                    async for recorded in events:
                        if until and recorded.position > until:
                            return
                        seen = recorded.position
                        for trajectory in assembler.add(recorded):
                            accepted = await self._accept(trajectory, assembler)
                            if accepted is not None:
                                yield accepted
                return
            except LogUnavailable as error:
                logger.warning("the log cannot be read now (%s); trying again", error)
                await asyncio.sleep(RETRY)

    async def _accept(self, trajectory: Trajectory, assembler: TrajectoryAssembler) -> Accepted | None:
        for digest in tool_digests(trajectory, self._tokenizer.name) - self._tools.keys():
            blob = await patiently(lambda digest=digest: self._log.get_blob(digest))  # type: ignore[misc]
            self._tools[digest] = msgspec.json.decode(blob, type=tuple[ToolSpec, ...])
        built = build_samples(trajectory, self._config.data, self._tokenizer, self._tools)
        self._counts.update(built.counts)
        if not built.samples:
            return None
        return Accepted(
            trajectory.run, trajectory.reward, tuple(built.samples), assembler.state, dict(self._counts)
        )


def _after(window: Sequence[Accepted], place: Place) -> Place:
    """The place at the beginning of the next window."""
    return Place(window[-1].log, window[-1].counts, place.window + 1, 0, place.until)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a read of the log until it answers."""
    while True:
        try:
            return await call()
        except LogUnavailable as error:
            logger.warning("the log cannot be read now (%s); trying again", error)
            await asyncio.sleep(RETRY)


async def _take(runs: AsyncIterator[Accepted], count: int) -> list[Accepted]:
    """The next `count` runs; fewer only at the end."""
    taken: list[Accepted] = []
    while len(taken) < count:
        try:
            taken.append(await anext(runs))
        except StopAsyncIteration:
            break
    return taken
