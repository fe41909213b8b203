"""The journal of kept answers: a finished generation is on disk before anyone is told of it.

An agent that dies after asking re-attaches by its call id: it gets the answer that was sampled, with the ids and
log-probabilities that were sampled, and nothing is generated twice. The journal is a folder of JSON-lines
segments, one line a completed generation, only ever appended to; whole segments go when a limit is passed. A
line that a crash tore off at the end is cut away at the next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from nexactor.events.errors import NexactorError
from nexactor.events.messages import Message

logger = logging.getLogger(__name__)

_SEGMENTS = 8
"""Segments that a full journal has: retention drops an eighth of it at a time."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One completed generation.

    `request` is the digest of what was asked (a call id used for something else is refused). `context` is the
    digest of the call's messages followed by its answer, `context_messages` their number: what the next turn
    must start with to go on token-exactly; `tools` and `tokenizer` must be the same for that, too. `message` is
    None for plain text completions. `time` is Unix nanoseconds. `logprobs` are float32 values under the policy
    at temperature 1.
    """

    call_id: str
    request: str
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    policy_version: str
    time: int
    message: Message | None = None
    context: str = ""
    context_messages: int = 0
    tools: str = ""
    tokenizer: str = ""
    cached_tokens: int = 0


class _Place(msgspec.Struct, frozen=True):
    """Where a line lies."""

    segment: int
    offset: int
    length: int


class _Pending:
    """An answer on its way to disk."""

    def __init__(self, call_id: str, line: bytes, done: asyncio.Event) -> None:
        self.call_id, self.line, self.done = call_id, line, done
        self.error: Exception | None = None


class _OnlyCallId(msgspec.Struct, frozen=True):
    call_id: str


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Answer)
_call_id_decoder = msgspec.json.Decoder(_OnlyCallId)


class AnswerJournal:
    """Kept answers by call id, on disk.

    `max_answers` and `max_bytes` bound what is kept: the oldest segments are removed first. One process owns a
    journal (a lock file says so); opening it twice raises NexactorError.
    """

    def __init__(self, folder: Path, *, max_answers: int = 100_000, max_bytes: int = 256 << 20) -> None:
        self._folder = folder
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._pending: list[_Pending] = []
        self._turn = asyncio.Lock()
        self._disk = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise NexactorError(
                f"the answer journal {folder} is in use by another policy server: stop it, or give this one "
                "another data folder"
            ) from error
        for number in sorted(_segments(folder)):
            self._load(number)
        if not self._sizes:
            self._sizes[1] = 0
        self._current = max(self._sizes)
        self._current_lines = sum(p.segment == self._current for p in self._places.values())
        self._file = (folder / _name(self._current)).open("ab", buffering=0)
        _sync_folder(folder)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._places

    def get(self, call_id: str) -> Answer | None:
        """The kept answer of a call, or None. Reads one line from disk."""
        place = self._places.get(call_id)
        if place is None:
            return None
        with (self._folder / _name(place.segment)).open("rb") as file:
            file.seek(place.offset)
            return _decoder.decode(file.read(place.length))

    async def keep(self, answer: Answer) -> None:
        """Write an answer; returns when it is on disk. Callers that come together share one fsync.

        Raises OSError if the disk refuses; the answer is then not kept.
        """
        mine = _Pending(answer.call_id, _encoder.encode(answer) + b"\n", asyncio.Event())
        self._pending.append(mine)
        async with self._turn:
            if not mine.done.is_set():
                batch, self._pending = self._pending, []
                await self._write_all(batch)
        if mine.error is not None:
            raise mine.error

    async def _write_all(self, batch: list[_Pending]) -> None:
        writing = asyncio.get_running_loop().run_in_executor(None, self._write, batch)
        try:
            await asyncio.wait([writing])
        finally:
            # A caller that is cancelled meanwhile must not leave the others of its batch in doubt.
            while not writing.done():
                await asyncio.wait([writing])
            for pending in batch:
                error = writing.exception()
                pending.error = error if isinstance(error, Exception) else None
                pending.done.set()

    def close(self) -> None:
        """Give the journal back."""
        with self._disk:
            self._file.close()
            self._lock_file.close()

    def _write(self, batch: list[_Pending]) -> None:
        with self._disk:
            offset = start = self._sizes[self._current]
            try:
                rest = memoryview(b"".join(p.line for p in batch))
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                # Half a line must not stay in front of the next one.
                os.ftruncate(self._file.fileno(), start)
                raise
            for pending in batch:
                self._places[pending.call_id] = _Place(self._current, offset, len(pending.line))
                self._places.move_to_end(pending.call_id)
                offset += len(pending.line)
            self._sizes[self._current] = offset
            self._current_lines += len(batch)
            full = offset >= self._max_bytes // _SEGMENTS
            if full or self._current_lines >= max(1, self._max_answers // _SEGMENTS):
                self._roll()

    def _roll(self) -> None:
        """Start a new segment, and drop the oldest ones while a limit is passed."""
        self._file.close()
        self._current += 1
        self._current_lines = 0
        self._sizes[self._current] = 0
        self._file = (self._folder / _name(self._current)).open("ab", buffering=0)
        while len(self._sizes) > 1 and (
            len(self._places) > self._max_answers or sum(self._sizes.values()) > self._max_bytes
        ):
            oldest = min(self._sizes)
            (self._folder / _name(oldest)).unlink(missing_ok=True)
            del self._sizes[oldest]
            for call_id in [c for c, p in self._places.items() if p.segment == oldest]:
                del self._places[call_id]
        _sync_folder(self._folder)

    def _load(self, number: int) -> None:
        """Index a segment; cut off a torn last line, skip (and report) damaged ones before it."""
        path = self._folder / _name(number)
        data = path.read_bytes()
        offset = 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                logger.warning("%s: the last line is torn (a crash while writing); cut off", path)
                with path.open("r+b") as file:
                    file.truncate(offset)
                    os.fsync(file.fileno())
                break
            try:
                call_id = _call_id_decoder.decode(line).call_id
            except msgspec.MsgspecError as error:
                logger.warning("%s: damaged line at byte %d skipped (%s)", path, offset, error)
            else:
                self._places[call_id] = _Place(number, offset, len(line))
                self._places.move_to_end(call_id)
            offset += len(line)
        self._sizes[number] = offset


def read_answers(folder: Path) -> Iterator[Answer]:
    """All answers in a journal folder, oldest first; needs no lock, so that a live server can be checked."""
    for number in sorted(_segments(folder)):
        for line in (folder / _name(number)).read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield _decoder.decode(line)


def count_generations(folder: Path) -> dict[str, int]:
    """How often each call id was generated to its end, from the journal alone: a value above 1 was paid twice."""
    return dict(Counter(answer.call_id for answer in read_answers(folder)))


def _name(number: int) -> str:
    return f"answers-{number:06d}.jsonl"


def _segments(folder: Path) -> list[int]:
    return [int(p.stem.removeprefix("answers-")) for p in folder.glob("answers-*.jsonl")]


def _sync_folder(folder: Path) -> None:
    """Make created and removed files of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
