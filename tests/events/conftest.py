"""Fixtures of the event log's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nexactor.events.broker import connect
from nexactor.events.jetstream import JetStreamLog
from nexactor.events.memory import MemoryLog

AnyLog = JetStreamLog | MemoryLog


@pytest.fixture(params=["memory", "jetstream"])
async def log(
    request: pytest.FixtureRequest, broker_data: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AnyLog]:
    """Each implementation of EventLog, empty."""
    if request.param == "memory":
        yield MemoryLog()
        return
    monkeypatch.delenv("NEXACTOR_NATS_URL", raising=False)
    async with await connect(data=broker_data, namespace=namespace) as broker:
        log = await JetStreamLog.open(broker)
        yield log
        await log.close()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder for a broker of this test's own, which it may kill."""
    monkeypatch.delenv("NEXACTOR_NATS_URL", raising=False)
    monkeypatch.delenv("NEXACTOR_NATS_PORT", raising=False)
    return tmp_path / "data"
