"""A log with two runs in it, on a real embedded broker, and the command line that reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nexactor.cli.main import app
from nexactor.events.broker import connect
from nexactor.events.jetstream import JetStreamLog
from nexactor.events.types import Event

Appends = Sequence[tuple[str, Sequence[Event]]]


class Cli:
    """The command line on one data folder, whose log holds the runs `first` (rewarded) and `second` (not yet)."""

    first = "0192aaaa0000700080000000000000a1"
    second = "0192aaaa0000700080000000000000b2"

    def __init__(self, data: Path) -> None:
        self.data = data
        self._runner = CliRunner()

    def __call__(self, *arguments: str) -> Result:
        """Run a command with --data set to the folder."""
        return self._runner.invoke(app, ["--data", str(self.data), *arguments])

    def bare(self, *arguments: str) -> Result:
        """Run a command with nothing added."""
        return self._runner.invoke(app, list(arguments))

    def lines(self, *arguments: str) -> list[dict[str, Any]]:
        """The JSON lines that a command prints."""
        result = self(*arguments)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def write(self, appends: Appends) -> None:
        """Add events to the log."""
        asyncio.run(self._write(appends))

    async def _write(self, appends: Appends) -> None:
        async with await connect(data=self.data) as broker:
            log = await JetStreamLog.open(broker)
            for stream, events in appends:
                await log.append(stream, events, expected_version=await log.version(stream))
            await log.close()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_run: Callable[..., Any]) -> Cli:
    for name in ("NEXACTOR_NATS_URL", "NEXACTOR_DATA", "NEXACTOR_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    cli = Cli(tmp_path / "data")
    first, second = (
        example_run(cli.first, "count the lines"),
        example_run(cli.second, "tidy up", reward=False),
    )
    cli.write([first[0], second[0], *first[1:], *second[1:]])
    return cli


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of fetched policies that holds the tiny one."""
    from nexactor.learner.tiny import make_tiny_policy

    folder = tmp_path_factory.mktemp("cache")
    make_tiny_policy(folder / "policies" / "tiny")
    return folder


@pytest.fixture
def policy(cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with that cache."""
    monkeypatch.setenv("NEXACTOR_CACHE", str(cache))
    return cli
