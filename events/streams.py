"""JetStream's wire details that nats-py does not cover: acknowledged publishes, streams, pull consumers.

Sources: https://docs.nats.io/reference/reference-protocols/nats_api_reference, ADR-13 (pull requests), ADR-31 (batched
direct get), ADR-17 (ordered consumer).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import nats.errors
from nats.aio.msg import Msg

from nexactor.events.broker import DEADLINE, ApiError, Broker, passes_by_itself
from nexactor.events.errors import LogError, LogUnavailable

WRONG_LAST_SEQUENCE = 10071
WRONG_LAST_SEQUENCE_IN_FLIGHT = 10164
NO_STREAM = 10059
NO_MESSAGE = 10037

_BATCH = 512
_MAX_BYTES = 16 << 20
_HEARTBEAT = 5.0
_EXPIRES = 30.0
_ATTEMPT = 5.0
_PULL_ENDED = ("Batch Completed", "Message Size Exceeds MaxBytes")


class Ack:
    """Answer to a publish: `sequence` is where it was stored; `code` is the error that was accepted, else 0."""

    __slots__ = ("code", "sequence")

    def __init__(self, sequence: int, code: int) -> None:
        self.sequence = sequence
        self.code = code


async def ensure_stream(broker: Broker, name: str, config: dict[str, Any]) -> None:
    """Create a file stream unless it exists; an existing one keeps its configuration."""
    try:
        await broker.api(f"STREAM.INFO.{name}")
        return
    except ApiError as error:
        if error.code != NO_STREAM:
            raise
    try:
        await broker.api(
            f"STREAM.CREATE.{name}", {"name": name, "storage": "file", "num_replicas": 1} | config
        )
    except ApiError as error:
        if error.code != 10058:  # another process created it in the meantime
            raise


async def ack_of(
    broker: Broker,
    subject: str,
    payload: bytes,
    headers: dict[str, str],
    *,
    accept: Sequence[int] = (),
    timeout: float = DEADLINE,
) -> Ack:
    """Publish and await the stream's acknowledgement, again and again through outages until the deadline.

    Only for publishes that carry an expectation, which make repeating harmless. Error codes in `accept` are returned;
    others raise LogError. Raises LogUnavailable at the deadline: the message may or may not be stored.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pause = 0.005
    while True:
        reply = await broker.request(
            subject, payload, headers=headers, timeout=max(deadline - loop.time(), 0.01), attempt=_ATTEMPT
        )
        answer = json.loads(reply.data)
        error = answer.get("error")
        if error is None:
            return Ack(int(answer["seq"]), 0)
        code, status = int(error.get("err_code", 0)), int(error.get("code", 0))
        if code in accept:
            return Ack(0, code)
        passing = code == WRONG_LAST_SEQUENCE_IN_FLIGHT or passes_by_itself(code, status)
        if not passing or loop.time() > deadline:
            kind = LogUnavailable if passing else LogError
            raise kind(f"the broker refused to store a message: {error.get('description')} (error {code})")
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.25)


class Puller:
    """An ordered reader of a stream: an unacknowledged pull consumer that is made anew whenever anything is odd.

    Yields every message with sequence >= `start` once and in order, through broker restarts, lost consumers and
    reconnects. Holds at most about two batches or 32 MiB in memory, whatever the pace of its reader.
    """

    def __init__(self, broker: Broker, stream: str, start: int, subjects: Sequence[str] = ()) -> None:
        self._broker = broker
        self._stream = stream
        self._subjects = list(subjects)
        self._next = start
        self._buffer: deque[tuple[int, int, Msg]] = deque()  # sequence, how many follow it, message
        self._wake = asyncio.Event()
        self._stale = True
        self._generation = 0
        self._consumer = ""
        self._delivered = 0
        self._asked = 0
        self._heard = 0.0

    async def messages(self, *, follow: bool) -> AsyncGenerator[tuple[int, Msg]]:
        """Sequence and message, in order. Without `follow`, ends when nothing more matches."""
        loop = asyncio.get_running_loop()
        inbox = self._broker.nc.new_inbox()
        subscription = await self._broker.nc.subscribe(f"{inbox}.*", cb=self._on_message)
        self._broker.on_lost.add(self._lose)
        drained = False
        try:
            while True:
                if self._stale:
                    drained = await self._create() == 0
                if drained and not follow and not self._buffer:
                    return
                await self._pull(inbox)
                if self._buffer:
                    sequence, following, message = self._buffer.popleft()
                    self._next = sequence + 1
                    yield sequence, message
                    if following == 0 and not follow:
                        return
                    continue
                self._wake.clear()
                silence = 2.5 * _HEARTBEAT - (loop.time() - self._heard)
                try:
                    async with asyncio.timeout(max(silence, 0)):
                        await self._wake.wait()
                except TimeoutError:
                    self._stale = True
        finally:
            self._broker.on_lost.discard(self._lose)
            await self._delete()
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    def _lose(self) -> None:
        self._stale = True
        self._wake.set()

    async def _delete(self) -> None:
        """Let the server forget the consumer; it would by itself, a minute later."""
        consumer, self._consumer = self._consumer, ""
        if consumer and self._broker.nc.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._broker.cast(f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}")

    async def _create(self) -> int:
        """A new consumer from the next wanted sequence; returns how many messages it has for us."""
        await self._delete()
        self._generation += 1
        self._delivered = self._asked = 0
        self._stale = False
        start = self._buffer[-1][0] + 1 if self._buffer else self._next
        self._consumer = f"nx-{secrets.token_hex(8)}"
        config: dict[str, Any] = {
            "name": self._consumer,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(start, 1),
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(60e9),
        }
        call = f"CONSUMER.CREATE.{self._stream}.{self._consumer}"
        if len(self._subjects) == 1:
            config["filter_subject"] = self._subjects[0]
            call += f".{self._subjects[0]}"
        elif self._subjects:
            config["filter_subjects"] = self._subjects
        request = {"stream_name": self._stream, "config": config, "action": ""}
        while True:
            try:
                answer = await self._broker.api(call, request)
                break
            except LogUnavailable:
                if self._broker.nc.is_closed:
                    raise
                continue  # a reader waits as long as the outage lasts
        self._heard = asyncio.get_running_loop().time()
        return int(answer["num_pending"])

    async def _pull(self, inbox: str) -> None:
        if self._stale or self._asked > _BATCH // 2 or len(self._buffer) > _BATCH // 2:
            return
        request = {
            "batch": _BATCH,
            "max_bytes": _MAX_BYTES,
            "expires": int(_EXPIRES * 1e9),
            "idle_heartbeat": int(_HEARTBEAT * 1e9),
        }
        self._asked += _BATCH
        self._heard = asyncio.get_running_loop().time()
        await self._broker.nc.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            json.dumps(request).encode(),
            reply=f"{inbox}.{self._generation}",
        )

    async def _on_message(self, message: Msg) -> None:
        # The reply subject of a delivery names its place; the inbox it came to names the pull's generation.
        if self._stale or not message.subject:
            return
        status = message.headers.get("Status") if message.headers else None
        if status is not None and not message.data and not message.reply.startswith("$JS.ACK."):
            await self._on_status(status, message)
            return
        # $JS.ACK.[domain.account.]stream.consumer.deliveries.sequence.delivery.time.following[.random]
        place = message.reply.split(".")
        consumer, _, sequence, delivery, _, following = place[3:9] if len(place) == 9 else place[5:11]
        if consumer != self._consumer:
            return
        self._delivered += 1
        if int(delivery) != self._delivered:
            self._lose()
            return
        self._asked = max(self._asked - 1, 0)
        self._heard = asyncio.get_running_loop().time()
        self._buffer.append((int(sequence), int(following), message))
        self._wake.set()

    async def _on_status(self, status: str, message: Msg) -> None:
        if message.subject.rsplit(".", 1)[-1] != str(self._generation):
            return
        self._heard = asyncio.get_running_loop().time()
        assert message.headers is not None
        if status == "100":  # idle heartbeat
            return
        description = message.headers.get("Description", "")
        if status == "408" or (status == "409" and description in _PULL_ENDED):
            self._asked = max(self._asked - int(message.headers.get("Nats-Pending-Messages", _BATCH)), 0)
            self._wake.set()
        else:  # 409 consumer deleted or leadership changed, 503 nobody there
            self._lose()
