"""Suite-wide rules: what may be skipped, and where."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nexactor.events.broker import Broker

IN_CI = os.environ.get("CI") == "true"


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
