"""The learner process: batches in log order, each step once in the log, the same weights whenever it is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from nexactor.events.cursor import START
from nexactor.events.errors import ConfigError, LogUnavailable
from nexactor.events.jetstream import JetStreamLog
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
from nexactor.learner import checkpoint, feed, loop
from nexactor.learner.config import LearnerConfig
from nexactor.learner.loop import run_learner
from nexactor.learner.rules import DataRules, OptimizerConfig
from nexactor.learner.tiny import make_tiny_policy
from nexactor.learner.weights import load_policy

pytestmark = [
    pytest.mark.usefixtures("orbax_leftovers"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TOOLS = (ToolSpec("add", "Add two numbers.", {"type": "object", "properties": {"a": {}, "b": {}}}),)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    make_tiny_policy(folder)
    return folder


async def write_text_run(
    log: Any, run: str, answer: str, *, reward: float = 1.0, split: str = "train"
) -> None:
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
            ModelCallStarted(
                call_id="c", model="ours", keep=0, messages=(Message("user", "t"),), tools="", prompt="p"
            ),
            ModelCallFinished(
                call_id="c", message=Message("assistant", "a"), finish_reason="stop", tokens=trace
            ),
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


def weights_at(folder: Path) -> list[Any]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_policy(folder).params)]


def weights(result: Any) -> list[Any]:
    return weights_at(result.path)


def essence(events: list[Event]) -> list[Any]:
    """What an unbroken and a broken run must agree on, bit by bit: all but times and paths."""
    found: list[Any] = []
    for e in events:
        if isinstance(e, LearnerStep):
            timeless = {k: v for k, v in e.metrics.items() if k not in ("seconds", "compiled")}
            found.append((e.step, e.events, e.cursor, timeless))
        elif isinstance(e, PolicyPublished):
            found.append((e.version.rsplit("-", 1)[1], e.digest, e.step))
    return found


async def test_it_trains_in_log_order_and_names_the_events_behind_each_step(
    tiny: Path, tmp_path: Path
) -> None:
    log = await a_log(5)
    seen: list[dict[str, Any]] = []
    result = await run_learner(a_config(tiny, tmp_path), log, progress=seen.append)
    events = [r async for r in log.subscribe(START, follow=False)]
    calls = [r.id for r in events if r.envelope.type == "ModelCallFinished"]
    steps = [e for e in await own_events(log) if isinstance(e, LearnerStep)]
    assert result.reason == "end_of_log"
    assert [s.events for s in steps] == [tuple(calls[0:2]), tuple(calls[2:4]), (calls[4],)]
    assert [p["step"] for p in seen] == [1, 2, 3]
    assert seen[0]["retokenised"] == 2
    assert steps[-1].metrics["count_trajectories"] == 5


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


async def test_a_following_learner_trains_on_runs_as_they_end_until_it_is_stopped(
    tiny: Path, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("epochs", "window"), [(1, 1), (2, 2)])
async def test_killed_at_any_boundary_it_gives_the_events_and_weights_of_an_unbroken_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, window: int, stride: int
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
    for boundary in itertools.count(1, stride):
        out = tmp_path / f"killed-{boundary}"
        fuse = boundary
        try:
            await run_learner(make(out), Fragile(log, tick))  # type: ignore[arg-type]
            break  # it has fewer boundaries than that: all were tried
        except Killed:
            fuse = 0
        broken = await run_learner(make(out), log)
        assert essence(await own_events(log, out.name)) == expected, f"killed at boundary {boundary}"
        for a, b in zip(weights(whole), weights(broken), strict=True):
            np.testing.assert_array_equal(a, b)
        shutil.rmtree(out)
    assert boundary > 40


PROGRAM = """
import asyncio, sys
from pathlib import Path
import msgspec
from nexactor.events.broker import connect
from nexactor.events.jetstream import JetStreamLog
from nexactor.learner.config import LearnerConfig
from nexactor.learner.loop import run_learner

async def main(data, namespace, config):
    async with await connect(data=Path(data), namespace=namespace) as broker:
        log = await JetStreamLog.open(broker)
        await run_learner(config, log, progress=lambda p: print(p["step"], flush=True))

asyncio.run(main(*sys.argv[1:3], msgspec.json.decode(sys.argv[3], type=LearnerConfig)))
"""


@pytest.mark.slow
async def test_killed_for_real_at_any_step_it_ends_with_the_weights_of_an_unbroken_run(
    tiny: Path, tmp_path: Path, broker: Any, broker_data: Path, namespace: str
) -> None:
    log = await JetStreamLog.open(broker)
    for i in range(12):
        await write_text_run(log, f"r{i}", f"the answer is {i}")
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}

    async def live(name: str, kill_after: int | None) -> int:
        """One life of a learner in a process of its own, killed once it has said so many steps."""
        config = msgspec.json.encode(
            a_config(tiny, tmp_path / name, name=name, epochs=2, window=3, checkpoint_every=3)
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(broker_data), namespace, config.decode(),
            stdout=asyncio.subprocess.PIPE, env=env,
        )  # fmt: skip
        assert process.stdout is not None
        said = 0
        async for _ in process.stdout:
            said += 1
            if said == kill_after:
                process.send_signal(signal.SIGKILL)
        return await process.wait()

    assert await live("whole", None) == 0
    for steps in (1, 2, 4):
        assert await live("killed", steps) == -signal.SIGKILL
    assert await live("killed", None) == 0
    assert essence(await own_events(log, "killed")) == essence(await own_events(log, "whole"))
    for a, b in zip(
        *(weights_at(tmp_path / n / "policies" / f"{n}-000012") for n in ("whole", "killed")), strict=True
    ):
        np.testing.assert_array_equal(a, b)


async def test_a_publication_that_is_gone_from_the_folder_is_written_again(
    tiny: Path, tmp_path: Path
) -> None:
    log = await a_log(4)
    first = await run_learner(a_config(tiny, tmp_path), log)
    before = weights(first)
    shutil.rmtree(tmp_path)
    again = await run_learner(a_config(tiny, tmp_path), log)
    published = [e for e in await own_events(log) if isinstance(e, PolicyPublished)]
    assert len(published) == 1
    for a, b in zip(before, weights(again), strict=True):
        np.testing.assert_array_equal(a, b)


async def test_a_second_learner_of_the_same_name_is_told_so(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(4)

    class Rival(Fragile):
        async def append(self, stream: str, events: Any, *, expected_version: int, **kwargs: Any) -> Any:
            rival = LearnerStep(step=1, events=(), cursor="0")
            await self._log.append(stream, [rival], expected_version=expected_version)
            return await self._log.append(stream, events, expected_version=expected_version, **kwargs)

    with pytest.raises(ConfigError, match=r"another learner writes to learner/main"):
        await run_learner(a_config(tiny, tmp_path), Rival(log, lambda: None))  # type: ignore[arg-type]


@pytest.mark.parametrize("arrived", [True, False])
async def test_an_append_without_an_answer_is_looked_up_before_it_is_repeated(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    log = await a_log(4)
    monkeypatch.setattr(loop, "RETRY", 0.0)

    class Deaf(Fragile):
        failed = False

        async def append(self, *args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return await self._log.append(*args, **kwargs)
            self.failed = True
            if arrived:
                await self._log.append(*args, **kwargs)
            raise LogUnavailable("no answer in time")

    await run_learner(a_config(tiny, tmp_path), Deaf(log, lambda: None))  # type: ignore[arg-type]
    assert [e.step for e in await own_events(log) if isinstance(e, LearnerStep)] == [1, 2]


async def test_a_log_that_is_away_for_a_while_is_read_on_from_where_it_stopped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await a_log(4)
    monkeypatch.setattr(feed, "RETRY", 0.0)
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls in (5, 11, 12):
            raise LogUnavailable("the broker is away")

    await run_learner(a_config(tiny, tmp_path / "a"), log)
    await run_learner(a_config(tiny, tmp_path / "b", name="other", batch=2), Reader(log, tick))  # type: ignore[arg-type]
    assert [e[1:] for e in essence(await own_events(log)) if isinstance(e[0], int)] == [
        e[1:] for e in essence(await own_events(log, "other")) if isinstance(e[0], int)
    ]
    assert calls > 12


class Reader(Fragile):
    """Fragile only where it is read."""

    async def append(self, *args: Any, **kwargs: Any) -> Any:
        return await self._log.append(*args, **kwargs)


async def test_other_settings_than_the_checkpoint_s_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    log = await a_log(4)
    await run_learner(a_config(tiny, tmp_path), log)
    with pytest.raises(ConfigError, match=r"batch was 2, is 3"):
        await run_learner(a_config(tiny, tmp_path, batch=3), log)


async def test_a_checkpoint_that_is_ahead_of_the_log_is_refused(tiny: Path, tmp_path: Path) -> None:
    await run_learner(a_config(tiny, tmp_path), await a_log(4))
    with pytest.raises(ConfigError, match="belong to different logs"):
        await run_learner(a_config(tiny, tmp_path), MemoryLog())


async def test_without_checkpoints_the_log_s_steps_are_checked_before_they_are_taken_over(
    tiny: Path, tmp_path: Path
) -> None:
    log = await a_log(4)
    await run_learner(a_config(tiny, tmp_path / "a"), log)
    with pytest.raises(ConfigError, match="step 1 of learner/main was trained on other events"):
        await run_learner(a_config(tiny, tmp_path / "b", batch=1), log)


async def test_damage_to_the_newest_checkpoint_costs_steps_but_changes_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    log = await a_log(8)
    whole = await run_learner(a_config(tiny, tmp_path / "a"), log)
    stop = asyncio.Event()

    def at_four(report: dict[str, Any]) -> None:
        if report["step"] == 3:
            stop.set()

    config = a_config(tiny, tmp_path / "b", name="other")
    await run_learner(config, log, progress=at_four, stop=stop)
    newest = max((tmp_path / "b" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    for path in newest.rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(b"damaged")
    again = await run_learner(config, log)
    assert again.step == whole.step
    for a, b in zip(weights(whole), weights(again), strict=True):
        np.testing.assert_array_equal(a, b)


async def test_only_the_newest_policies_and_checkpoints_stay(tiny: Path, tmp_path: Path) -> None:
    await run_learner(a_config(tiny, tmp_path, batch=1, keep=2), await a_log(8))
    assert sorted(p.name for p in (tmp_path / "policies").iterdir()) == ["main-000006", "main-000008"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


async def test_a_learner_that_ended_at_the_end_of_the_log_goes_on_with_what_came_since(
    tiny: Path, tmp_path: Path
) -> None:
    log = await a_log(4)
    first = await run_learner(a_config(tiny, tmp_path), log)
    await write_text_run(log, "late", "more")
    second = await run_learner(a_config(tiny, tmp_path), log)
    assert (first.step, second.step) == (2, 3)


async def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        await run_learner(LearnerConfig(policy=str(tmp_path / "nowhere"), out=str(tmp_path)), MemoryLog())
