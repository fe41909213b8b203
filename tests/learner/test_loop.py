"""The learner process: batches in log order, each step once in the log, the same weights whenever it is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from nexactor.events.errors import ConfigError, LogUnavailable
from nexactor.events.memory import MemoryLog
from nexactor.events.messages import Message, TokenTrace, ToolSpec
from nexactor.events.segments import encode_ids, encode_logprobs
from nexactor.events.types import (
    AgentFailed,
    AgentFinished,
    AgentStarted,
    Event,
    LearnerStep,
    ModelCallFinished,
    ModelCallStarted,
    PolicyPublished,
    RewardAssigned,
    RunFinished,
    RunStarted,
)
from nexactor.learner import checkpoint, loop
from nexactor.learner.config import LearnerConfig
from nexactor.learner.loop import run_learner
from nexactor.learner.rules import DataRules, OptimizerConfig
from nexactor.learner.tiny import make_tiny_policy
from nexactor.learner.weights import load_policy

TOOLS = (ToolSpec("add", "Add two numbers.", {"type": "object", "properties": {"a": {}, "b": {}}}),)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    make_tiny_policy(folder)
    return folder


async def write_text_run(log: Any, run: str, answer: str, *, reward: float = 1.0, split: str = "train") -> None:
    """A run of an expert that returns no token ids: one call, one answer, a reward."""
    tools = await log.put_blob(msgspec.json.encode(TOOLS, order="deterministic"))
    messages = (Message("system", "You add."), Message("user", f"Task {run}"))
    await log.append(
        f"agent/{run}",
        [
            RunStarted(task=f"Task {run}", spec="s", agent="root", labels={"split": split}),
            AgentStarted(name="root", spec="s", input=f"Task {run}"),
            ModelCallStarted(call_id="c", model="expert", keep=0, messages=messages, tools=tools, prompt="p"),
            ModelCallFinished(call_id="c", message=Message("assistant", answer), finish_reason="stop"),
            AgentFinished(result=answer),
            RunFinished(status="finished", result=answer),
        ],
        expected_version=0,
    )
    await log.append(
        f"annotation/{run}", [RewardAssigned(run=run, reward=reward, source="check")], expected_version=0
    )


async def write_token_run(log: Any, run: str, seed: int) -> None:
    """A run of our own policy: ids and log-probabilities as sampled."""
    rng = np.random.default_rng(seed)
    prompt, ids = [7, 8, 9, *rng.integers(3, 200, 5)], rng.integers(3, 200, 6)
    trace = TokenTrace(0, encode_ids(prompt), encode_ids(ids), encode_logprobs([-1.0] * 6))
    await log.append(
        f"agent/{run}",
        [
            RunStarted(task="t", spec="s", agent="root", labels={"split": "train"}),
            AgentStarted(name="root", spec="s", input="t"),
            ModelCallStarted(call_id="c", model="ours", keep=0, messages=(Message("user", "t"),), tools="", prompt="p"),
            ModelCallFinished(call_id="c", message=Message("assistant", "a"), finish_reason="stop", tokens=trace),
            AgentFinished(result="a"),
            RunFinished(status="finished", result="a"),
        ],
        expected_version=0,
    )
    await log.append(
        f"annotation/{run}", [RewardAssigned(run=run, reward=1.0, source="check")], expected_version=0
    )


async def a_log(runs: int = 12) -> MemoryLog:
    log = MemoryLog()
    for i in range(runs):
        if i % 3 == 2:
            await write_token_run(log, f"r{i}", i)
        else:
            await write_text_run(log, f"r{i}", f"the answer is {i}")
    return log


def a_config(tiny: Path, out: Path, **changes: Any) -> LearnerConfig:
    values: dict[str, Any] = {
        "policy": str(tiny),
        "out": str(out),
        "follow": False,
        "batch": 2,
        "data": DataRules(labels={"split": "train"}, min_reward=0.5, max_tokens=256),
        "optimizer": OptimizerConfig(lr=1e-3, warmup=2),
        "publish_every": 2,
        "checkpoint_every": 2,
        "buckets": (256,),
    }
    return LearnerConfig(**{**values, **changes})


async def own_events(log: Any, name: str = "main") -> list[Event]:
    return [r.event async for r in log.read(f"learner/{name}")]


def weights(result: Any) -> list[Any]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_policy(result.path).params)]


def essence(events: list[Event]) -> list[Any]:
    """What an unbroken and a broken run must agree on, bit by bit: all but times and paths."""
    found: list[Any] = []
    for e in events:
        if isinstance(e, LearnerStep):
            timeless = {k: v for k, v in e.metrics.items() if k not in ("seconds", "compiled")}
            found.append((e.step, e.events, e.cursor, timeless))
        elif isinstance(e, PolicyPublished):
            found.append((e.version, e.digest, e.step))
    return found


async def test_it_trains_in_log_order_and_names_the_events_behind_each_step(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(5)
    seen: list[dict[str, Any]] = []
    result = await run_learner(a_config(tiny, tmp_path), log, progress=seen.append)
    calls = [r.id async for r in log.subscribe(await start(), follow=False) if r.envelope.type == "ModelCallFinished"]
    steps = [e for e in await own_events(log) if isinstance(e, LearnerStep)]
    assert result.reason == "end_of_log"
    assert [s.events for s in steps] == [tuple(calls[0:2]), tuple(calls[2:4]), (calls[4],)]
    assert [p["step"] for p in seen] == [1, 2, 3]
    assert seen[0]["retokenised"] == 2
    assert steps[-1].metrics["count_trajectories"] == 5


async def start() -> Any:
    from nexactor.events.cursor import START

    return START


async def test_the_loss_of_a_repeated_batch_falls(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(4)
    seen: list[dict[str, Any]] = []
    config = a_config(tiny, tmp_path, batch=4, epochs=30, optimizer=OptimizerConfig(lr=3e-3, warmup=2))
    await run_learner(config, log, progress=seen.append)
    assert len(seen) == 30
    assert seen[-1]["loss"] < 0.3 * seen[0]["loss"]


async def test_published_policies_load_and_name_their_step(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(8)
    result = await run_learner(a_config(tiny, tmp_path, max_steps=3), log)
    published = [e for e in await own_events(log) if isinstance(e, PolicyPublished)]
    assert [(p.version, p.step) for p in published] == [("main-000002", 2), ("main-000003", 3)]
    assert result.version == "main-000003"
    before = jax.tree.leaves(load_policy(tiny).params)
    assert any((np.asarray(a) != b).any() for a, b in zip(before, weights(result), strict=True))


async def test_runs_that_do_not_fit_the_rules_are_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    log = MemoryLog()
    await write_text_run(log, "bad", "no", reward=0.0)
    await write_text_run(log, "held", "out", split="test")
    await log.append(
        "agent/broken",
        [
            RunStarted(task="t", spec="s", agent="root", labels={"split": "train"}),
            AgentFailed(error="the endpoint is away", infra=True),
            RunFinished(status="failed"),
        ],
        expected_version=0,
    )
    await write_text_run(log, "good", "yes")
    seen: list[dict[str, Any]] = []
    await run_learner(a_config(tiny, tmp_path), log, progress=seen.append)
    counts = seen[-1]["counts"]
    assert (counts["trajectories"], counts["dropped_reward"], counts["dropped_labels"]) == (1, 1, 1)
    assert counts["dropped_infra"] == 1


async def test_a_following_learner_trains_on_runs_as_they_end_until_it_is_stopped(tiny: Path, tmp_path: Path) -> None:
    log, stop, stepped = MemoryLog(), asyncio.Event(), asyncio.Event()

    async def learn() -> Any:
        config = a_config(tiny, tmp_path, follow=True)
        return await run_learner(config, log, progress=lambda _: stepped.set(), stop=stop)

    async with asyncio.TaskGroup() as tasks:
        learning = tasks.create_task(learn())
        await write_text_run(log, "a", "one")
        await write_text_run(log, "b", "two")
        await stepped.wait()
        stop.set()
    result = learning.result()
    assert (result.step, result.reason) == (1, "stopped")
    assert result.version == "main-000001"


async def test_after_a_stop_it_goes_on_with_the_next_run_and_repeats_none(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(8)
    unbroken = await run_learner(a_config(tiny, tmp_path / "a"), log)
    stop = asyncio.Event()
    config = a_config(tiny, tmp_path / "b", name="other")
    first = await run_learner(config, log, progress=lambda p: stop.set(), stop=stop)
    second = await run_learner(config, log)
    assert (first.step, second.step) == (1, unbroken.step)
    for a, b in zip(weights(unbroken), weights(second), strict=True):
        np.testing.assert_array_equal(a, b)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Fragile:
    """A log that dies at its n-th call: before it (even n) or after it took effect (odd n)."""

    def __init__(self, log: MemoryLog, tick: Callable[[], None]) -> None:
        self._log, self._tick = log, tick

    async def append(self, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        result = await self._log.append(*args, **kwargs)
        self._tick()
        return result

    async def subscribe(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for recorded in self._log.subscribe(*args, **kwargs):
            self._tick()
            yield recorded

    async def get_blob(self, digest: str) -> bytes:
        self._tick()
        return await self._log.get_blob(digest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


@pytest.mark.parametrize(("epochs", "window"), [(1, 1), (2, 2)])
async def test_killed_at_any_boundary_it_gives_the_events_and_weights_of_an_unbroken_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, window: int
) -> None:
    log = await a_log(7)
    make = lambda out: a_config(tiny, out, epochs=epochs, window=window, name=out.name)  # noqa: E731
    whole = await run_learner(make(tmp_path / "whole"), log)
    expected = essence(await own_events(log, "whole"))

    fuse = 0

    def tick() -> None:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise Killed

    def fragile(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return call

    monkeypatch.setattr(loop, "save_policy", fragile(loop.save_policy))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", fragile(checkpoint.Checkpoints.save))
    monkeypatch.setattr(loop.Trainer, "step", fragile(loop.Trainer.step))
    deaths = 0
    for length in (1, 3, 7, 13, 16, 19, 23, 29, 31, 37):  # lives of different length, until it gets through
        fuse = length
        try:
            await run_learner(make(tmp_path / "killed"), Fragile(log, tick))  # type: ignore[arg-type]
            break
        except Killed:
            deaths += 1
    fuse = 0
    broken = await run_learner(make(tmp_path / "killed"), log)
    assert deaths > 3
    renamed = [(e[0].replace("killed", "whole"), *e[1:]) if isinstance(e[0], str) else e
               for e in essence(await own_events(log, "killed"))]
    assert renamed == expected
    assert broken.step == whole.step
    for a, b in zip(weights(whole), weights(broken), strict=True):
        np.testing.assert_array_equal(a, b)


PROGRAM = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from nexactor.learner.loop import run_learner
import importlib.util
spec = importlib.util.spec_from_file_location("loop_tests", {tests!r} + "/test_loop.py")
tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)

async def main():
    # The same log every time, without the learner's own events: as if they had never reached it.
    log = await tests.a_log(8)
    await run_learner(tests.a_config(Path({tiny!r}), Path({out!r})), log, progress=lambda p: print(p["step"], flush=True))

asyncio.run(main())
"""
