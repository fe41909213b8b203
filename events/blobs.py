"""Blobs on JetStream: bytes stored once under their SHA-256, in chunks, on a stream of their own.

Subjects: `nx.<namespace>.blob.<digest>` holds the first chunk and, as a header, how many follow; those lie at
`nx.<namespace>.blob.<digest>.<size of a chunk>.<index>` and are written before it. So a blob is there when its first
chunk is. Every chunk is published with "expect nothing on this subject yet", so a blob is never stored twice, and
repeating a put after a lost acknowledgement is harmless.
"""

from __future__ import annotations

import base64
from collections import OrderedDict

from nexactor.events.broker import ApiError, Broker
from nexactor.events.errors import LogError
from nexactor.events.records import check_blob, digest_of
from nexactor.events.streams import NO_MESSAGE, WRONG_LAST_SEQUENCE, ack_of, ensure_stream

CACHE_BYTES = 64 << 20
"""Blobs kept in memory; tool lists and agent specifications are asked for again and again."""
_COUNT = "Nx-Chunks"


class Blobs:
    """The blob store of one namespace."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._stream = f"NX-{broker.namespace}-blobs"
        self._prefix = f"nx.{broker.namespace}.blob"
        self._chunk = min(512 << 10, broker.max_payload - 4096)
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
        size = self._chunk
        for i in range(1, -(-len(data) // size)):
            await self._store(f"{digest}.{size}.{i}", data[i * size : (i + 1) * size], {})
        count = max(-(-len(data) // size), 1)
        await self._store(digest, data[:size], {_COUNT: str(count)})
        self._remember(digest, data)
        return digest

    async def get(self, digest: str) -> bytes:
        """The bytes of a blob. Raises LogError if there is none, IntegrityError if they were altered."""
        kept = self._cache.get(digest)
        if kept is not None:
            self._cache.move_to_end(digest)
            return kept
        first, count = await self._load(digest, digest)
        rest = [(await self._load(f"{digest}.{len(first)}.{i}", digest))[0] for i in range(1, count)]
        data = check_blob(digest, b"".join([first, *rest]))
        self._remember(digest, data)
        return data

    async def _store(self, name: str, chunk: bytes, headers: dict[str, str]) -> None:
        headers = headers | {"Nats-Expected-Last-Subject-Sequence": "0"}
        await ack_of(self._broker, f"{self._prefix}.{name}", chunk, headers, accept=(WRONG_LAST_SEQUENCE,))

    async def _load(self, name: str, digest: str) -> tuple[bytes, int]:
        """A chunk, and the count of chunks if it is the first."""
        subject = f"{self._prefix}.{name}"
        reply = await self._broker.request(f"$JS.API.DIRECT.GET.{self._stream}.{subject}", attempt=5.0)
        headers = reply.headers or {}
        if "Status" not in headers:
            return reply.data, int(headers.get(_COUNT, "1"))
        # The replica that answered may lag behind: the leader knows.
        try:
            answer = await self._broker.api(f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject})
        except ApiError as error:
            if error.code == NO_MESSAGE:
                raise LogError(f"there is no blob {digest} in namespace {self._broker.namespace}") from None
            raise
        message = answer["message"]
        return base64.b64decode(message.get("data", "")), _count(message.get("hdrs", ""))

    def _remember(self, digest: str, data: bytes) -> None:
        if len(data) > CACHE_BYTES // 4 or digest in self._cache:
            return
        self._cache[digest] = data
        self._cached += len(data)
        while self._cached > CACHE_BYTES:
            self._cached -= len(self._cache.popitem(last=False)[1])


def _count(headers: str) -> int:
    for line in base64.b64decode(headers).decode().split("\r\n"):
        name, _, value = line.partition(":")
        if name == _COUNT:
            return int(value)
    return 1
