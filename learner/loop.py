"""The learner process: follows the log, trains, checkpoints, publishes, and can be killed at any of these.

Each step is: take the next batch in log order, train, append LearnerStep (with PolicyPublished where due),
then now and then commit a checkpoint. A restart goes back to the last checkpoint; steps after it that are in
the log already are computed again, checked against what the log says they trained on, and not appended twice.
So batches, events and final weights are those of an unbroken run. The learner only reads what actors write:
it never slows them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgspec

from nexactor.events.cursor import Cursor
from nexactor.events.errors import ConfigError, LogUnavailable, VersionConflict
from nexactor.events.log import EventLog
from nexactor.events.types import Event, LearnerStep, PolicyPublished
from nexactor.learner.checkpoint import Checkpoints, Place, Saved
from nexactor.learner.config import LearnerConfig
from nexactor.learner.feed import Batch, Feed, patiently
from nexactor.learner.fetch import resolve_policy
from nexactor.learner.model import Config
from nexactor.learner.tokenizer import PolicyTokenizer
from nexactor.learner.train import StepMetrics, Trainer, TrainState, default_buckets
from nexactor.learner.weights import Policy, folder_digest, load_policy, save_policy

logger = logging.getLogger(__name__)
T = TypeVar("T")

Progress = Callable[[dict[str, Any]], None]

_AHEAD = 2
"""Batches that may wait for the trainer; the reader stops when they do."""
RETRY = 1.0
"""Seconds before an append is tried again after the log did not answer."""


@dataclass(frozen=True)
class LearnerResult:
    """How a learner ended: at which step, why (max_steps, stopped, end_of_log), and the last policy it published."""

    step: int
    reason: str
    version: str
    path: Path | None


@dataclass
class _History:
    """The learner's own stream as the log has it."""

    version: int = 0
    steps: dict[int, tuple[str, ...]] = field(default_factory=dict)
    published: dict[int, PolicyPublished] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        self.version += 1
        if isinstance(event, LearnerStep):
            self.steps[event.step] = event.events
        elif isinstance(event, PolicyPublished):
            self.published[event.step] = event


async def run_learner(
    config: LearnerConfig,
    log: EventLog,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
) -> LearnerResult:
    """Train until `max_steps`, the end of the log (follow: false), or `stop`, then checkpoint and publish.

    `progress` gets a dictionary after each step (see `_report`). `stop` lets the step in hand finish. The
    same configuration and log go on where they ended. Raises ConfigError where the policy, the checkpoints or
    the log do not fit the configuration.
    """
    # One thread for all device work: steps, checkpoints and exports never overlap, the loop stays responsive.
    with ThreadPoolExecutor(1, "learner") as thread:
        learner = await _start(config, log, thread)
        try:
            async with asyncio.TaskGroup() as tasks:
                queue: asyncio.Queue[Batch | None] = asyncio.Queue(_AHEAD)
                reader = tasks.create_task(_read(learner.feed, queue))
                reason = await _train(learner, queue, progress, stop)
                reader.cancel()
        except BaseExceptionGroup as group:
            # One failure is reported as itself: callers know NexactorError, not groups.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        await learner.finish(reason)
        last = learner.history.published.get(max(learner.history.published, default=-1))
        return LearnerResult(
            learner.step, reason, last.version if last else "", Path(last.path) if last else None
        )


async def _start(config: LearnerConfig, log: EventLog, thread: Executor) -> _Learner:
    """Restore the last checkpoint, or begin; read what the log has of this learner."""
    out = await _in(thread, lambda: Path(config.out).expanduser().absolute())
    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    policy = await _in(thread, lambda: load_policy(resolve_policy(config.policy)))
    buckets = config.buckets or default_buckets(config.data.max_tokens)
    trainer = Trainer(policy.config, config.optimizer, buckets=buckets, remat=config.remat)
    like = jax.eval_shape(lambda params: trainer.init(params, config.seed), policy.params)
    found = await _in(thread, lambda: checkpoints.load(like))
    stream = f"learner/{config.name}"
    history = await patiently(lambda: _history(log, stream))
    identity = _identity(config)
    if found is None:
        begin = Cursor.parse(config.cursor)
        head = await patiently(log.head)
        place = Place(until=0 if config.follow else head.positions[0])
        place = msgspec.structs.replace(
            place, log=msgspec.structs.replace(place.log, cursor=begin.positions[0], seen=begin.positions[0])
        )
        state = await _in(thread, lambda: trainer.init(policy.params, config.seed))
        saved = Saved(0, place, identity)
        if not config.follow:  # where the log ended at the first start must outlive a kill
            await _in(thread, lambda: checkpoints.save(state, saved))
    else:
        state, saved = found
        _check_identity(saved.identity, identity, checkpoints.folder)
        newest = max(history.steps, default=0)
        if saved.step > newest:
            raise ConfigError(
                f"{checkpoints.folder} is at step {saved.step}, but {stream} in this log only has {newest} steps: "
                "they belong to different logs. Give the learner another `out`, or the log it was trained from"
            )
        place = saved.place
        if config.follow or not place.until:
            head = await patiently(log.head)
            place = msgspec.structs.replace(place, until=0 if config.follow else head.positions[0])
        logger.info("learner %s goes on after step %d", config.name, saved.step)
    return _Learner(
        config=config,
        log=log,
        thread=thread,
        model=policy.config,
        tokenizer=policy.tokenizer,
        trainer=trainer,
        checkpoints=checkpoints,
        out=out,
        stream=stream,
        history=history,
        identity=identity,
        feed=Feed(log, config, policy.tokenizer, place),
        state=state,
        step=saved.step,
        saved_step=saved.step if found is not None or not config.follow else -1,
        place=place,
    )


@dataclass
class _Learner:
    """One learner at work: what it was given, and what changes from step to step."""

    config: LearnerConfig
    log: EventLog
    thread: Executor
    model: Config
    tokenizer: PolicyTokenizer
    trainer: Trainer
    checkpoints: Checkpoints
    out: Path
    stream: str
    history: _History
    identity: dict[str, Any]
    feed: Feed
    state: TrainState
    step: int
    saved_step: int
    place: Place

    async def train(self, batch: Batch) -> StepMetrics:
        """One step, its events in the log, and the checkpoint that is due."""
        number = self.step + 1
        logged = self.history.steps.get(number)
        if logged is not None and logged != batch.events:
            raise ConfigError(
                f"step {number} of {self.stream} was trained on other events than the log now gives: the configuration "
                "(data, batch, window, epochs, cursor, seed) or the log is not what it was. Restore it, or start a "
                "learner with another `name` and `out`"
            )
        self.state, metrics = await _in(self.thread, lambda: self.trainer.step(self.state, batch.samples))
        events: list[Event] = []
        if logged is None:
            events.append(
                LearnerStep(
                    step=number, events=batch.events, cursor=batch.cursor, metrics=_numbers(batch, metrics)
                )
            )
        if number % self.config.publish_every == 0 or number == self.config.max_steps:
            events += await self._publish(number)
        if events:
            await self._append(events)
        self.step, self.place = number, batch.place
        if number % self.config.checkpoint_every == 0:
            await self.checkpoint()
        return metrics

    async def checkpoint(self) -> None:
        saved = Saved(self.step, self.place, self.identity)
        await _in(self.thread, lambda: self.checkpoints.save(self.state, saved))
        self.saved_step = self.step

    async def finish(self, reason: str) -> None:
        """The checkpoint and the publication of the last step, where they are not there yet."""
        if reason == "end_of_log":
            # A later start takes the log's head as of then.
            self.place = msgspec.structs.replace(self.place, until=0)
            self.saved_step = -1
        if self.step and self.saved_step != self.step:
            await self.checkpoint()
        if self.step:
            events = await self._publish(self.step)
            if events:
                await self._append(events)

    async def _publish(self, step: int) -> list[Event]:
        """Write the policy of a step; its event, unless the log has it."""
        version = f"{self.config.name}-{step:06d}"
        folder = self.out / "policies" / version
        known = self.history.published.get(step)
        if known is not None and (step < max(self.history.published) or await self._intact(known)):
            return []
        policy = Policy(self.state.params, self.model, self.tokenizer, version)
        digest = await _in(self.thread, lambda: save_policy(policy, folder))
        await _in(self.thread, lambda: _prune(folder.parent, self.config.keep))
        if known is not None:
            if known.digest != digest:
                logger.warning("policy %s was written again and differs from the one published", version)
            return []
        return [PolicyPublished(version=version, path=str(folder), digest=digest, step=step)]

    async def _intact(self, published: PolicyPublished) -> bool:
        path = Path(published.path)
        return await _in(self.thread, lambda: path.is_dir() and folder_digest(path) == published.digest)

    async def _append(self, events: list[Event]) -> None:
        while True:
            expected = self.history.version
            try:
                await self.log.append(self.stream, events, expected_version=expected)
                break
            except LogUnavailable as error:
                logger.warning("the log does not take step %d now (%s); trying again", self.step + 1, error)
                await asyncio.sleep(RETRY)
                now = await patiently(lambda: _history(self.log, self.stream))
                if now.version == expected + len(events) and _same(now, events):
                    break
            except VersionConflict as error:
                raise ConfigError(
                    f"another learner writes to {self.stream}: stop it, or give this one another `name` and `out` "
                    f"({error})"
                ) from error
        for event in events:
            self.history.add(event)


async def _read(feed: Feed, queue: asyncio.Queue[Batch | None]) -> None:
    async with aclosing(feed.batches()) as batches:
        async for batch in batches:
            await queue.put(batch)
    await queue.put(None)


async def _train(
    learner: _Learner,
    queue: asyncio.Queue[Batch | None],
    progress: Progress | None,
    stop: asyncio.Event | None,
) -> str:
    """Train on batches as they come; returns why it ended."""
    limit = learner.config.max_steps
    while True:
        if limit and learner.step >= limit:
            return "max_steps"
        begun = time.perf_counter()
        item = await _next(queue, stop)
        if not isinstance(item, Batch):
            return "stopped" if item is _STOPPED else "end_of_log"
        waited = time.perf_counter() - begun
        metrics = await learner.train(item)
        if progress is not None:
            progress(_report(learner, item, metrics, queue.qsize(), waited))


_STOPPED = object()


async def _next(queue: asyncio.Queue[Batch | None], stop: asyncio.Event | None) -> Any:
    """The next batch, None at the end of the log, or _STOPPED; a stop counts before a batch that waits."""
    if stop is None:
        return await queue.get()
    if stop.is_set():
        return _STOPPED
    async with asyncio.TaskGroup() as tasks:
        got, stopped = tasks.create_task(queue.get()), tasks.create_task(stop.wait())
        await asyncio.wait((got, stopped), return_when=asyncio.FIRST_COMPLETED)
        # A batch taken in the moment of the stop is let go: the place has not moved, it is read again.
        result = _STOPPED if stopped.done() else got.result()
        got.cancel()
        stopped.cancel()
    return result


def _report(
    learner: _Learner, batch: Batch, metrics: StepMetrics, queued: int, waited: float
) -> dict[str, Any]:
    """What `progress` gets: the step's numbers and counts, speeds, and how the input keeps up."""
    return {
        **asdict(metrics),
        **_batch_numbers(batch),
        "step": learner.step,
        "max_steps": learner.config.max_steps,
        "epoch": batch.epoch,
        "tokens_per_second": metrics.tokens / metrics.seconds,
        "unique_ratio": metrics.unique / metrics.tokens,
        "queue": queued,
        "waited": waited,
        "counts": batch.counts,
        "published": max(learner.history.published, default=0),
        "checkpoint": max(learner.saved_step, 0),
    }


def _batch_numbers(batch: Batch) -> dict[str, float]:
    rewards = [r.reward for r in batch.runs if r.reward is not None]
    numbers: dict[str, float] = {
        "runs": len(batch.runs),
        "samples": len(batch.samples),
        "retokenised": sum(s.retokenised for s in batch.samples),
    }
    if rewards:
        numbers["reward"] = sum(rewards) / len(rewards)
    return numbers


def _numbers(batch: Batch, metrics: StepMetrics) -> dict[str, float]:
    """The metrics of a LearnerStep: the step's numbers, the batch's, and the counts so far as `count_...`."""
    counts = {f"count_{k}": float(v) for k, v in sorted(batch.counts.items())}
    step = {k: float(v) for k, v in asdict(metrics).items()}
    return {
        **step,
        **{k: float(v) for k, v in _batch_numbers(batch).items()},
        "epoch": float(batch.epoch),
        **counts,
    }


async def _history(log: EventLog, stream: str) -> _History:
    history = _History()
    async for recorded in log.read(stream):
        history.add(recorded.event)
    return history


def _same(history: _History, events: list[Event]) -> bool:
    return all(
        history.steps.get(e.step) == e.events
        if isinstance(e, LearnerStep)
        else isinstance(e, PolicyPublished) and e.step in history.published
        for e in events
    )


_ORDER = ("policy", "cursor", "data", "batch", "window", "epochs", "seed", "wait_for_reward", "max_open_runs")


def _identity(config: LearnerConfig) -> dict[str, Any]:
    """The settings that decide which batches come in which order, and what they are trained into."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))  # as a checkpoint gives it back
    return {key: values[key] for key in _ORDER}


def _check_identity(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    changed = [f"{k} was {saved.get(k)!r}, is {now[k]!r}" for k in now if saved.get(k) != now[k]]
    if changed:
        raise ConfigError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Restore them to go on with it, or give "
            "the learner another `name` and `out`"
        )


def _prune(folder: Path, keep: int) -> None:
    old = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))[:-keep]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


async def _in(thread: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, work)
