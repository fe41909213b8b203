"""The demo's child processes: started, watched, killed with SIGKILL, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from nexactor.events.errors import NexactorError


class Child:
    """One process that can be killed and started again with the same command; its output goes to a file."""

    def __init__(self, name: str, arguments: list[str], *, log: Path, env: dict[str, str]) -> None:
        self.name, self.log = name, log
        self.starts = 0
        self._command = [sys.executable, "-m", "nexactor", *arguments]
        self._env = {**os.environ, **env}
        self._process: asyncio.subprocess.Process | None = None
        self._expected = False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def ended_well(self) -> bool:
        """Whether it ran to its end by itself."""
        return self._process is not None and self._process.returncode == 0

    async def start(self) -> None:
        """Start it; a session of its own, so that a Ctrl-C in the terminal reaches only the demo."""
        self.starts += 1
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                start_new_session=True,
            )
        self._expected = False

    async def kill(self) -> bool:
        """SIGKILL, at once. Whether that is what ended it (it may have ended by itself before)."""
        assert self._process is not None
        self._expected = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        return await self._process.wait() == -signal.SIGKILL

    async def stop(self, grace: float = 30.0) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds."""
        if not self.running:
            return
        assert self._process is not None
        self._expected = True
        self._process.terminate()
        try:
            async with asyncio.timeout(grace):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def wait(self) -> int:
        """Its exit code."""
        assert self._process is not None
        return await self._process.wait()

    def check(self) -> None:
        """Raises NexactorError if the process ended by itself with an error."""
        if self._process is not None and not self._expected and self._process.returncode not in (None, 0):
            tail = self.log.read_text(errors="replace").splitlines()[-12:]
            raise NexactorError(
                f"the demo's {self.name} process ended with code {self._process.returncode}; the end of {self.log}:\n"
                + "\n".join(f"  {line}" for line in tail)
            )
