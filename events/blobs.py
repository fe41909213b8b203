"""Blobs on JetStream: bytes stored once under their SHA-256, in chunks, on a stream of their own.

Subject `nx.<namespace>.blob.<digest>.<chunk>`. Chunk 0 is written last and names their count: a blob is there when its
chunk 0 is. Every chunk is published with "expect nothing on this subject yet", so a blob is never stored twice, and
repeating a put after a lost acknowledgement is harmless.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

from nexactor.events.broker import ApiError, Broker
from nexactor.events.errors import LogError
from nexactor.events.records import check_blob, digest_of
from nexactor.events.streams import NO_MESSAGE, WRONG_LAST_SEQUENCE, ack_of, ensure_stream

CACHE_BYTES = 64 << 20
"""Blobs kept in memory; tool lists and agent specifications are asked for again and again."""


class Blobs:
    """The blob store of one namespace."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._stream = f"NX-{broker.namespace}-blobs"
        self._prefix = f"nx.{broker.namespace}.blob"
        self._chunk = broker.max_payload - 4096
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached = 0

    async def create(self) -> None:
        """Create the stream if it is missing."""
        await ensure_stream(
            self._broker,
            self._stream,
            {"subjects": [f"{self._prefix}.>"], "discard": "new", "deny_delete": True, "allow_direct": True},
        )

    async def put(self, data: bytes) -> str:
        """Store bytes; returns their digest. Storing them again costs one request."""
        digest = digest_of(data)
        if digest in self._cache:
            return digest
        chunks = [data[i : i + self._chunk] for i in range(0, len(data), self._chunk)] or [b""]
        for i in [*range(1, len(chunks)), 0]:
            headers = {"Nats-Expected-Last-Subject-Sequence": "0"}
            if i == 0:
                headers["Nx-Chunks"] = str(len(chunks))
            subject = f"{self._prefix}.{digest}.{i}"
            await ack_of(self._broker, subject, chunks[i], headers, accept=(WRONG_LAST_SEQUENCE,))
        self._remember(digest, data)
        return digest

    async def get(self, digest: str) -> bytes:
        """The bytes of a blob. Raises LogError if there is none, IntegrityError if they were altered."""
        kept = self._cache.get(digest)
        if kept is not None:
            self._cache.move_to_end(digest)
            return kept
        message = await self._last(f"{self._prefix}.{digest}.0", digest)
        first = base64.b64decode(message.get("data", ""))
        count = _chunks(message.get("hdrs", ""))
        rest = [
            base64.b64decode((await self._last(f"{self._prefix}.{digest}.{i}", digest)).get("data", ""))
            for i in range(1, count)
        ]
        data = check_blob(digest, b"".join([first, *rest]))
        self._remember(digest, data)
        return data

    async def _last(self, subject: str, digest: str) -> dict[str, Any]:
        try:
            answer = await self._broker.api(f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject})
        except ApiError as error:
            if error.code == NO_MESSAGE:
                raise LogError(f"there is no blob {digest} in namespace {self._broker.namespace}") from None
            raise
        message: dict[str, Any] = answer["message"]
        return message

    def _remember(self, digest: str, data: bytes) -> None:
        if len(data) > CACHE_BYTES // 4 or digest in self._cache:
            return
        self._cache[digest] = data
        self._cached += len(data)
        while self._cached > CACHE_BYTES:
            self._cached -= len(self._cache.popitem(last=False)[1])


def _chunks(headers: str) -> int:
    for line in base64.b64decode(headers).decode().split("\r\n"):
        name, _, value = line.partition(":")
        if name == "Nx-Chunks":
            return int(value)
    return 1
