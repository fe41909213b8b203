"""Suite-wide rules: what may be skipped, and where."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nexactor.events import types as ev
from nexactor.events.messages import Message, TokenTrace, ToolCall, Usage
from nexactor.events.segments import encode_ids, encode_logprobs

if TYPE_CHECKING:
    from nexactor.events.broker import Broker

IN_CI = os.environ.get("CI") == "true"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: children would inherit that Ctrl-C is ignored, and some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that compare with torch or transformers are skipped, visibly, where those are absent."""
    if item.get_closest_marker("torch_required"):
        absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if absent:
            pytest.skip(f"{' and '.join(absent)} not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, which installs everything that tests need, a skip is a failure."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files (`pytest.importorskip` at the top of one)."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.fixture
def orbax_leftovers() -> Iterator[None]:
    """For tests of damaged checkpoints: orbax drops coroutines and futures then, which Python reports when it collects
    them, perhaps within another test. So they are collected here; such a file ignores PytestUnraisableExceptionWarning.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def broker_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder whose embedded nats-server runs for the whole session; tests part by namespace."""
    from nexactor.events.embedded import Embedded

    data = tmp_path_factory.mktemp("broker")
    embedded = Embedded(data)
    asyncio.run(embedded.ensure())
    yield data
    asyncio.run(embedded.stop())


@pytest.fixture
def namespace() -> str:
    """A namespace of this test's own on the shared broker."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def broker(broker_data: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Broker]:
    """A connection to the session's real nats-server, in a namespace of its own. Do not kill this server."""
    from nexactor.events.broker import connect

    monkeypatch.delenv("NEXACTOR_NATS_URL", raising=False)
    async with await connect(data=broker_data, namespace=namespace) as broker:
        yield broker


Appends = list[tuple[str, Sequence[ev.Event]]]


def _example_run(run: str, task: str, *, reward: bool = True) -> Appends:
    """The appends of a run in which a root agent calls a tool and a sub-agent, then answers."""
    root, child = f"agent/{run}", f"agent/{run}/worker-1"
    call = ToolCall("c1", "read_file", '{"path": "a.txt"}')
    hand = ToolCall("c2", "worker", '{"message": "count"}')
    trace = TokenTrace(0, encode_ids([1, 2]), encode_ids([3, 4]), encode_logprobs([-0.5, -0.25]), "t")
    appends: Appends = [
        (
            root,
            [
                ev.ActorActivated(node="node-a"),
                ev.RunStarted(task=task, spec="s", agent="lead", labels={"split": "train"}),
                ev.AgentStarted(name="lead", spec="s", input=task),
                ev.ModelCallStarted(
                    call_id="m1",
                    model="tiny",
                    keep=0,
                    messages=(Message("user", task),),
                    tools="",
                    prompt="p1",
                ),
            ],
        ),
        (
            root,
            [
                ev.ModelCallFinished(
                    call_id="m1",
                    message=Message("assistant", "", (call, hand)),
                    finish_reason="tool_calls",
                    usage=Usage(20, 5, 10),
                    policy_version="v7",
                    tokens=trace,
                ),
                ev.ToolCallStarted(
                    effect_id="t1",
                    tool_call_id="c1",
                    name="read_file",
                    arguments=call.arguments,
                    repeat="safe",
                ),
                ev.SubAgentStarted(
                    effect_id="t2", tool_call_id="c2", name="worker", child=child, input="count"
                ),
            ],
        ),
        (child, [ev.ActorActivated(node="node-b"), ev.AgentStarted(name="worker", spec="w", input="count")]),
        (child, [ev.ActorActivated(node="node-a")]),
        (
            root,
            [ev.ToolCallFailed(effect_id="t1", tool_call_id="c1", name="read_file", error="no such file")],
        ),
        (child, [ev.AgentFinished(result="three")]),
        (
            root,
            [
                ev.SubAgentFinished(
                    effect_id="t2",
                    tool_call_id="c2",
                    name="worker",
                    child=child,
                    status="finished",
                    result="three",
                ),
                ev.AgentFinished(result="there are three"),
                ev.RunFinished(status="finished", result="there are three"),
            ],
        ),
    ]
    if reward:
        appends.append(
            (
                f"annotation/{run}",
                [ev.RewardAssigned(run=run, reward=0.75, source="checker", parts={"files": 0.5})],
            )
        )
    return appends


@pytest.fixture
def example_run() -> Callable[..., Appends]:
    """`example_run(run, task, reward=True)`: the appends (stream, events) of a whole run, in order."""
    return _example_run
