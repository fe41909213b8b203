"""The connection to NATS: an embedded server by default, any NATS cluster by URL; the same code either way.

A `Broker` never gives up: the client reconnects for ever, requests wait through outages up to their deadline, and
where the server is the embedded one, a keeper in every process starts it again when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from nexactor.events.embedded import Address, Embedded, broker_pid, check_version, kill_server
from nexactor.events.errors import BrokerError, LogError, LogUnavailable

__all__ = ["ApiError", "Broker", "broker_pid", "connect", "kill_server"]

DEADLINE = 60.0
"""Seconds a request waits through an outage before it raises LogUnavailable."""
FIRST_CONNECT = 5.0
"""Seconds to try a given URL before it counts as unreachable."""
JETSTREAM_WAIT = 2.0
"""Seconds a server may take to offer JetStream before it counts as having none."""
_ATTEMPT = 5.0
"""Seconds before an unanswered JetStream request is sent again although the connection seems well."""

_log = logging.getLogger("nexactor.events.broker")

# Unavailable, but for reasons that only a person removes: resources exhausted, JetStream off, store failed.
_LASTING = frozenset({10023, 10039, 10076, 10077})


def passes_by_itself(code: int, status: int) -> bool:
    """Whether a JetStream error (its err_code and status) is one of an outage or overload, worth trying again."""
    return status in (429, 503) and code not in _LASTING


class ApiError(BrokerError):
    """The JetStream API refused a call. `code` is the server's err_code (https://docs.nats.io, JetStream errors)."""

    def __init__(self, call: str, code: int, description: str) -> None:
        self.code = code
        super().__init__(f"JetStream refused {call}: {description} (error {code})")


class _Lost(Exception):
    """The connection went away while a reply was awaited."""


class Broker:
    """A connection to NATS that outlives outages. Get one from `connect`; `async with` closes it.

    nc: the nats-py client, for subscriptions and core publishes. url: without credentials.
    data: the data folder of an embedded broker, None for a remote one.
    """

    def __init__(self, nc: Client, namespace: str, url: str, embedded: Embedded | None) -> None:
        self.nc = nc
        self.namespace = namespace
        self.url = url
        self.data = embedded.data if embedded else None
        self.on_lost: set[Callable[[], None]] = set()
        """Called when the connection is lost: whoever awaits something of the server's starts over."""
        self._embedded = embedded
        self._up = asyncio.Event()
        self._up.set()
        self._down = asyncio.Event()
        self._inbox = nc.new_inbox()
        self._replies: dict[str, Callable[[Msg | _Lost], None]] = {}
        self._tokens = 0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def max_payload(self) -> int:
        """Bytes a message may have, headers included."""
        return self.nc.max_payload

    async def connected(self, timeout: float = DEADLINE) -> None:
        """Return once there is a connection; LogUnavailable after `timeout` seconds without."""
        if not self._up.is_set():
            try:
                async with asyncio.timeout(timeout):
                    await self._up.wait()
            except TimeoutError:
                raise LogUnavailable(
                    f"no connection to the broker at {self.url} for {timeout:.0f} s"
                ) from None
        if self.nc.is_closed:
            reason = f" ({self.nc.last_error})" if self.nc.last_error else ""
            raise LogUnavailable(f"the connection to the broker at {self.url} is closed{reason}")

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        timeout: float = DEADLINE,
        attempt: float | None = None,
    ) -> Msg:
        """One reply to one request. Waits through outages and for a responder to appear, up to `timeout` seconds.

        The request is sent again after a lost connection, and, where `attempt` is given, every `attempt` seconds:
        its handling must be idempotent. Raises LogUnavailable at the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pause = 0.005
        while True:
            left = deadline - loop.time()
            if left <= 0:
                raise LogUnavailable(
                    f"the broker at {self.url} gave no answer to {subject} for {timeout:.0f} s"
                )
            await self.connected(left)
            left = deadline - loop.time()
            try:
                reply = await self._ask(subject, payload, headers, min(left, attempt) if attempt else left)
            except (_Lost, TimeoutError):
                continue
            except nats.errors.MaxPayloadError as error:
                raise LogError(
                    f"a message of {len(payload)} bytes to {subject} is above the server's limit of {self.max_payload}"
                ) from error
            except (nats.errors.ConnectionClosedError, nats.errors.OutboundBufferLimitError):
                await asyncio.sleep(pause)
                continue  # lost a moment ago: the callback that says so is still to come
            if reply.headers and reply.headers.get("Status") == "503":  # no responders
                await asyncio.sleep(min(pause, max(left, 0)))
                pause = min(pause * 2, 0.25)
                continue
            return reply

    async def request_many(
        self,
        subject: str,
        payload: bytes,
        *,
        ends: Callable[[Msg], bool],
        timeout: float = DEADLINE,
    ) -> list[Msg]:
        """All replies to one request up to the one that `ends` it (left out). Starts over after a lost connection."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            left = deadline - loop.time()
            if left <= 0:
                raise LogUnavailable(
                    f"the broker at {self.url} gave no answer to {subject} for {timeout:.0f} s"
                )
            await self.connected(left)
            replies: list[Msg] = []
            done: asyncio.Future[None] = loop.create_future()

            def take(
                reply: Msg | _Lost, replies: list[Msg] = replies, done: asyncio.Future[None] = done
            ) -> None:
                if done.done():
                    return
                if isinstance(reply, _Lost):
                    done.set_exception(reply)
                elif ends(reply):
                    done.set_result(None)
                else:
                    replies.append(reply)

            token = self._expect(take)
            try:
                await self.nc.publish(subject, payload, reply=f"{self._inbox}.{token}")
                async with asyncio.timeout(min(_ATTEMPT, max(deadline - loop.time(), 0.01))):
                    await done
            except (_Lost, TimeoutError):
                continue
            finally:
                self._replies.pop(token, None)
            return replies

    async def api(
        self, call: str, payload: dict[str, Any] | None = None, *, timeout: float = DEADLINE
    ) -> dict[str, Any]:
        """One call of the JetStream API, like `api("STREAM.INFO.NAME", {})`; waits through outages.

        Raises ApiError if the server refuses it, LogUnavailable after `timeout` seconds without an answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        body = json.dumps(payload or {}).encode()
        pause = 0.01
        while True:
            reply = await self.request(
                f"$JS.API.{call}", body, timeout=max(deadline - loop.time(), 0.01), attempt=_ATTEMPT
            )
            answer: dict[str, Any] = json.loads(reply.data)
            error = answer.get("error")
            if error is None:
                return answer
            status = int(error.get("code", 0))
            code = int(error.get("err_code", status))
            if not passes_by_itself(code, status) or loop.time() > deadline:
                raise ApiError(call, code, str(error.get("description", "no reason given")))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.25)

    async def cast(self, subject: str, payload: bytes = b"") -> None:
        """A request whose reply nobody awaits (the JetStream API ignores messages that ask for none)."""
        await self.nc.publish(subject, payload, reply=f"{self._inbox}.0")

    async def close(self) -> None:
        """Disconnect; end the embedded server if this process started it. Files stay."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if not self.nc.is_closed:
            if self._up.is_set():
                # What was published must leave before the socket closes: have a message to ourselves come back.
                with contextlib.suppress(_Lost, TimeoutError, nats.errors.Error):
                    await self._ask("", b"", None, 2.0)
            await self.nc.close()
        self._fail_waiting()
        if self._embedded is not None:
            await self._embedded.stop()

    async def __aenter__(self) -> Broker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _expect(self, take: Callable[[Msg | _Lost], None]) -> str:
        self._tokens += 1
        token = str(self._tokens)
        self._replies[token] = take
        return token

    async def _ask(self, subject: str, payload: bytes, headers: dict[str, str] | None, timeout: float) -> Msg:
        """One attempt of a request; to ourselves if `subject` is empty. Raises _Lost or TimeoutError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()

        def take(reply: Msg | _Lost) -> None:
            if answer.done():
                return
            if isinstance(reply, _Lost):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)

        token = self._expect(take)
        inbox = f"{self._inbox}.{token}"
        timer = loop.call_later(timeout, _expire, answer)
        try:
            await self.nc.publish(subject or inbox, payload, reply=inbox, headers=headers)
            return await answer
        finally:
            timer.cancel()
            self._replies.pop(token, None)

    async def _listen(self) -> None:
        await self.nc.subscribe(f"{self._inbox}.*", cb=self._on_reply)

    async def _on_reply(self, message: Msg) -> None:
        take = self._replies.get(message.subject.rsplit(".", 1)[1])
        if take is not None:
            take(message)

    def _fail_waiting(self) -> None:
        for take in list(self._replies.values()):
            take(_Lost())

    async def _on_disconnected(self) -> None:
        self._up.clear()
        self._down.set()
        self._fail_waiting()
        for callback in list(self.on_lost):
            callback()

    async def _on_closed(self) -> None:
        """For good: by `close`, or because the server refused the credentials after a reconnect."""
        self._fail_waiting()
        self._up.set()  # whoever waits for the connection learns that there will be none

    async def _on_reconnected(self) -> None:
        self._down.clear()
        self._up.set()

    async def _keep(self) -> None:
        """Start the embedded server again whenever it is gone; runs until `close`."""
        assert self._embedded is not None
        while True:
            await self._down.wait()
            while not self._up.is_set():
                try:
                    address = await self._embedded.ensure()
                    if address.url != self.url:
                        _log.info("the embedded broker moved from %s to %s", self.url, address.url)
                        self.url = address.url
                        self.nc.set_server_pool([address.url])
                except BrokerError as error:
                    _log.warning("the embedded broker is down and cannot be started again yet: %s", error)
                    await asyncio.sleep(0.25)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self._up.wait()


async def connect(*, data: Path | None = None, url: str | None = None, namespace: str = "default") -> Broker:
    """Connect to the broker: `url`, else NEXACTOR_NATS_URL, else the embedded server of the folder `data`.

    `data` defaults to ./.nexactor. `url` may list several servers with commas, and hold credentials
    (nats://token@host:4222). `namespace` separates projects on one server: letters, digits, `_` and `-`.
    Raises BrokerError (unreachable, wrong credentials, too old, no JetStream, folder not writable, port taken).
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", namespace):
        raise BrokerError(f"the namespace {namespace!r} is not usable: only letters, digits, '_' and '-' are")
    url = url or os.environ.get("NEXACTOR_NATS_URL") or None
    if url is not None:
        return await _finish(await _Dial(url, None).open(), namespace, without_secrets(url), None)
    embedded = Embedded((data or Path(".nexactor")).absolute())
    address = await embedded.ensure()
    try:
        for _ in range(20):
            try:
                dial = await _Dial(address.url, address).open()
                break
            except BrokerError:
                address = await embedded.ensure()  # it died between the two, or moved
        else:
            dial = await _Dial(address.url, address).open()
        return await _finish(dial, namespace, address.url, embedded)
    except BaseException:
        await embedded.stop()
        raise


def _expire(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def without_secrets(url: str) -> str:
    """A NATS URL (or several) with passwords and tokens masked."""
    return ",".join(re.sub(r"//[^@/]*@", "//***@", part.strip()) for part in url.split(","))


class _Dial:
    """The first connection: nats-py would try for ever in silence, a person wants to know what is wrong."""

    def __init__(self, url: str, address: Address | None) -> None:
        self.servers = [part.strip() for part in url.split(",") if part.strip()]
        for server in self.servers:
            try:
                parts = urlsplit(server if "://" in server else f"nats://{server}")
                if parts.hostname is None or parts.port == 0:
                    raise ValueError("it names no host or port 0")
            except ValueError as error:
                raise BrokerError(
                    f"{without_secrets(server)!r} is not a NATS URL ({error}): write nats://[token@]host:4222"
                ) from error
        self.address = address
        self.shown = without_secrets(url)
        self.broker: Broker | None = None
        self.nc = Client()

    async def open(self) -> _Dial:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (FIRST_CONNECT if self.address is None else 1.0)
        while True:
            self.nc = Client()
            try:
                await self._once()
                return self
            except (OSError, nats.errors.Error, TimeoutError, ValueError) as error:
                with contextlib.suppress(Exception):  # it failed, but may have left a socket open
                    await self.nc.close()
                text = str(error)
                if "authorization" in text.lower() or isinstance(error, nats.errors.AuthorizationError):
                    raise BrokerError(
                        f"the NATS server at {self.shown} refused the credentials: "
                        "check the token or user in NEXACTOR_NATS_URL (nats://token@host:4222)"
                    ) from error
                if loop.time() > deadline:
                    raise BrokerError(
                        f"no NATS server answers at {self.shown} ({text or type(error).__name__}): start one, correct "
                        "NEXACTOR_NATS_URL, or unset it and nexactor starts its own"
                    ) from error
                await asyncio.sleep(0.05)

    async def _once(self) -> None:
        async def on_error(error: Exception) -> None:
            _log.debug("nats: %s", error)

        async def on_disconnected() -> None:
            if self.broker is not None:
                await self.broker._on_disconnected()

        async def on_closed() -> None:
            if self.broker is not None:
                await self.broker._on_closed()

        async def on_reconnected() -> None:
            if self.broker is not None:
                await self.broker._on_reconnected()

        await self.nc.connect(
            servers=self.servers,
            token=self.address.token if self.address else None,
            name=f"nexactor-{os.getpid()}-{secrets.token_hex(3)}",
            error_cb=on_error,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
            # Strict for the first connection only, see below.
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.02 if self.address else 0.2,  # type: ignore[arg-type]
            connect_timeout=2,
            ping_interval=20,
            max_outstanding_pings=2,
            pending_size=64 << 20,
            inbox_prefix=b"_INBOX",
        )
        self.nc.options["allow_reconnect"] = True
        self.nc.options["max_reconnect_attempts"] = -1


async def _finish(dial: _Dial, namespace: str, url: str, embedded: Embedded | None) -> Broker:
    """Check that the server will do, and wrap the connection."""
    broker = Broker(dial.nc, namespace, url, embedded)
    dial.broker = broker
    try:
        version = dial.nc.connected_server_version
        check_version(f"{version.major}.{version.minor}.{version.patch}", f"the NATS server at {url}")
        await broker._listen()
        try:
            await broker.api("INFO", timeout=JETSTREAM_WAIT)
        except (ApiError, LogUnavailable) as error:
            raise BrokerError(
                f"the NATS server at {url} has no JetStream for this account ({error}): "
                "start it with `-js` or a `jetstream` block, and enable JetStream for the account"
            ) from error
        if embedded is not None:
            broker._keeper = asyncio.get_running_loop().create_task(broker._keep(), name="broker-keeper")
    except BaseException:
        await dial.nc.close()
        raise
    return broker
