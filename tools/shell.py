"""The shell tool: a command in the workspace folder, in a process group of its own, with a clean environment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread

from nexactor.tools.confinement import workspace_of
from nexactor.tools.decorator import tool
from nexactor.tools.journal import EffectJournal
from nexactor.tools.protocol import ToolContext, ToolResult

OUTPUT_LIMIT = 8000
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TERM")
_AFTER_EXIT = (
    1.0  # seconds a pipe may stay open after the command ended, held by a process that left its group
)


@tool(repeat="never", timeout=120.0, output_limit=OUTPUT_LIMIT)
async def shell(command: str, context: ToolContext) -> ToolResult:
    """Run a shell command in the workspace folder.

    Output and errors are returned together, then `exit code N` if it is not 0. The command and all processes of its
    group are killed when it ends, at the time limit and on cancellation.

    This is NOT a sandbox: the command starts in the workspace, without the caller's environment variables, but runs as
    the same user and can reach whatever that user can (files, network, other processes). Use it with trusted models, or
    inside a container.
    """
    root = workspace_of(context)
    await anyio.to_thread.run_sync(EffectJournal(root).record, context.effect_id, "shell")
    # A pipe of our own, not asyncio's: some versions let wait() hang while a background process holds asyncio's open.
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", command),
                cwd=root,
                env=clean_environment(os.environ, home=root),
                stdin=DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        output = _Output()
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(_collect(pipe, output))
                await process.wait()
                _kill_group(process)  # what it left in the background ends with it
                await asyncio.wait({reader}, timeout=_AFTER_EXIT)
                reader.cancel()
        finally:
            _kill_group(process)
            with anyio.CancelScope(shield=True):
                await process.wait()
    return output.result(process.returncode or 0)


def clean_environment(environment: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """The few variables a command needs; everything else (keys, tokens) is left out. HOME is the workspace."""
    kept = {name: environment[name] for name in _KEPT_VARIABLES if name in environment}
    return {"PATH": os.defpath, **kept, "HOME": str(home), "PWD": str(home)}


class _Output:
    """The first OUTPUT_LIMIT characters' worth of bytes, and how much was dropped: a flood cannot fill memory."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.dropped = 0

    def add(self, data: bytes) -> None:
        room = max(0, 4 * OUTPUT_LIMIT - len(self.kept))
        self.kept += data[:room]
        self.dropped += len(data) - len(data[:room])

    def result(self, code: int) -> ToolResult:
        text = self.kept.decode("utf-8", "replace").removesuffix("\n")
        room = (
            OUTPUT_LIMIT - 100
        )  # for the two notices below, so that the tool's own limit cuts nothing again
        cut = max(0, len(text) - room) + self.dropped
        if cut:
            text = f"{text[:room]}\n[{cut} more characters cut]"
        if code:
            text = f"{text}\nexit code {code}".removeprefix("\n")
        return ToolResult(text or "ok", cut)


async def _collect(pipe: IO[bytes], output: _Output) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        while data := await reader.read(1 << 16):
            output.add(data)
    finally:
        transport.close()


def _kill_group(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
