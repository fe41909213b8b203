"""The shell tool: a clean environment, bounded output, and nothing left running."""

from __future__ import annotations

import asyncio
import json
import os
import select
from pathlib import Path

import pytest

from nexactor.tools import ToolContext, ToolError, tool
from nexactor.tools.journal import count_applied, journal_path
from nexactor.tools.shell import OUTPUT_LIMIT, clean_environment, shell


@pytest.fixture
def context(tmp_path: Path) -> ToolContext:
    (tmp_path / "ws").mkdir()
    return ToolContext(effect_id="e", workspace=tmp_path / "ws")


async def run(command: str, context: ToolContext) -> str:
    return (await shell.run(json.dumps({"command": command}), context)).text


class Lifeline:
    """A pipe in the workspace that a process holds open as long as it lives: its end is the process's end."""

    def __init__(self, workspace: Path) -> None:
        os.mkfifo(workspace / "life")
        self._file = os.open(workspace / "life", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._file, False)

    async def born(self) -> None:
        await self._readable()
        assert os.read(self._file, 1) == b"x"

    async def dead(self) -> None:
        await self._readable()
        assert os.read(self._file, 1) == b""
        os.close(self._file)

    async def _readable(self) -> None:
        await asyncio.to_thread(select.select, [self._file], [], [])


HOLD = "exec 3> life; printf x >&3; sleep 1000"


async def test_a_command_runs_in_the_workspace_and_tells_output_errors_and_code(context: ToolContext) -> None:
    assert context.workspace is not None
    assert await run("pwd", context) == str(context.workspace.resolve())
    assert await run("echo out; echo err >&2; exit 3", context) == "out\nerr\nexit code 3"
    assert await run("exit 4", context) == "exit code 4"
    assert await run("true", context) == "ok"


async def test_secrets_of_the_environment_are_not_passed_on(
    context: ToolContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "sk-secret" not in await run("env", context)
    assert set(clean_environment(os.environ, home=Path("/h"))) <= {
        *("PATH", "HOME", "PWD", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TERM")
    }


async def test_a_flood_of_output_is_cut_and_counted(context: ToolContext) -> None:
    result = await shell.run(json.dumps({"command": "head -c 3000000 /dev/zero | tr '\\0' y"}), context)
    kept = result.text.index("\n")
    assert kept + result.truncated == 3_000_000
    assert len(result.text) <= OUTPUT_LIMIT


async def test_a_command_that_waits_for_input_gets_none(context: ToolContext) -> None:
    assert await run("cat", context) == "ok"


async def test_background_processes_end_with_the_command(context: ToolContext) -> None:
    assert context.workspace is not None
    life = Lifeline(context.workspace)
    assert (
        await run("mkfifo go; (exec 3> life; printf x >&3; echo > go; sleep 1000) & cat go", context) == "ok"
    )
    await life.born()
    await life.dead()


async def test_a_cancelled_command_is_killed_with_its_children(context: ToolContext) -> None:
    assert context.workspace is not None
    life = Lifeline(context.workspace)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run(f"sh -c '{HOLD}'; true", context))
        await life.born()
        task.cancel()
    assert task.cancelled()
    await life.dead()


async def test_a_command_is_killed_at_the_time_limit(context: ToolContext) -> None:
    assert context.workspace is not None
    life = Lifeline(context.workspace)
    quick = tool(timeout=1.5)(shell.function)
    with pytest.raises(ToolError, match=r"longer than 1\.5 seconds"):
        await quick.run(json.dumps({"command": HOLD}), context)
    await life.born()
    await life.dead()


async def test_each_command_is_in_the_ledger_before_it_runs(context: ToolContext) -> None:
    assert context.workspace is not None
    assert shell.repeat == "never"
    seen = await run("cat ../ws.journal.jsonl", context)
    assert '"effect_id":"e"' in seen
    assert count_applied(journal_path(context.workspace)) == {"e": 1}
