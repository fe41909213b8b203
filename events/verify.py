"""Verification: walk the stored log and name every event that is missing, altered, reordered or unreadable.

What is checked: each stream's versions run 1, 2, 3...; each event names the hash of the one before it; messages and
bodies decode; blobs have their digests. A hash chain cannot show that its own last link was altered or cut off: that
takes a ledger kept elsewhere, like the journal of JetStreamLog.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from nexactor.events.cursor import position
from nexactor.events.envelope import GENESIS, Envelope, decode_event, split_append
from nexactor.events.errors import ConfigError, IntegrityError, LogError
from nexactor.events.ids import run_of
from nexactor.events.records import RawLog, Stored


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with one event.

    kind: missing, altered, reordered, repeated, unreadable, misplaced or blob (lost or altered).
    event: its id, empty where it is not known. version: 0 where it is not known.
    """

    kind: str
    stream: str
    version: int
    event: str
    detail: str

    def __str__(self) -> str:
        which = f"event {self.version}" if self.version else "an event"
        known = f" ({self.event})" if self.event else ""
        return f"{self.kind}: {which} of {self.stream}{known}: {self.detail}"


class Report(msgspec.Struct, frozen=True):
    """What `verify` walked over and what it found."""

    messages: int
    events: int
    streams: int
    blobs: int
    ledger: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        counted = f"{self.events} events in {self.streams} streams, {self.blobs} blobs"
        if self.ledger:
            counted += f", {self.ledger} ledger lines"
        if self.ok:
            return f"verified: {counted}"
        return "\n".join([f"{len(self.problems)} problems in {counted}:", *(f"  {p}" for p in self.problems)])


class _LedgerLine(msgspec.Struct, frozen=True):
    stream: str
    version: int
    hash: str


class _Chain:
    """What is known of one stream during the walk."""

    def __init__(self) -> None:
        self.version = 0
        self.hash: bytes | None = GENESIS
        self.id = ""
        self.gaps: set[int] = set()


async def verify(log: RawLog, run: str | None = None, *, ledger: Path | None = None) -> Report:
    """Check one run, or the whole log if `run` is None; against a journal of acknowledged appends if `ledger` is given.

    Damage is reported, not raised. Raises ConfigError if the ledger cannot be read.
    """
    walk = _Walk(log)
    expected = {} if ledger is None else _read_ledger(ledger, run)
    lines = sum(map(len, expected.values()))
    async for stored in log.stored(run or ""):
        await walk.message(stored, expected)
    walk.end(expected)
    return Report(walk.messages, walk.events, len(walk.chains), len(walk.blobs), lines, tuple(walk.problems))


class _Walk:
    def __init__(self, log: RawLog) -> None:
        self.log = log
        self.messages = 0
        self.events = 0
        self.chains: dict[str, _Chain] = {}
        self.blobs: set[str] = set()
        self.problems: list[Problem] = []

    async def message(self, stored: Stored, expected: dict[tuple[str, int], set[str]]) -> None:
        self.messages += 1
        chain = self.chains.setdefault(stored.stream, _Chain())
        try:
            records = split_append(stored.data, f"message {stored.sequence}")
        except IntegrityError as error:
            self._add("unreadable", stored.stream, 0, "", str(error))
            chain.hash = None
            return
        for i, (envelope, hash) in enumerate(records):
            self.events += 1
            where = f"message {stored.sequence}, position {position(stored.sequence, i)}"
            if envelope.stream != stored.stream:
                self._add(
                    "misplaced", stored.stream, envelope.version, envelope.id,
                    f"its envelope says {envelope.stream} ({where})",
                )  # fmt: skip
                continue
            self._link(chain, envelope, hash, where)
            await self._body(envelope, where)
            hashes = expected.get((envelope.stream, envelope.version))
            if hashes is not None:
                if hash.hex() in hashes:
                    hashes.discard(hash.hex())
                else:
                    self._add(
                        "altered", envelope.stream, envelope.version, envelope.id,
                        f"the ledger has another hash for it ({where})",
                    )  # fmt: skip
                    hashes.clear()

    def _link(self, chain: _Chain, envelope: Envelope, hash: bytes, where: str) -> None:
        version, stream = envelope.version, envelope.stream
        if version <= chain.version:
            if version in chain.gaps:
                chain.gaps.discard(version)
                self._add(
                    "reordered",
                    stream,
                    version,
                    envelope.id,
                    f"it comes after event {chain.version} ({where})",
                )
            else:
                self._add(
                    "repeated", stream, version, envelope.id, f"the stream had that version already ({where})"
                )
            return
        if version > chain.version + 1:
            chain.gaps.update(range(chain.version + 1, version))
        elif chain.hash is not None and envelope.prev != chain.hash:
            if version == 1:
                self._add("altered", stream, 1, envelope.id, f"a first event names one before it ({where})")
            else:
                self._add(
                    "altered", stream, version - 1, chain.id,
                    f"event {version} ({envelope.id}) names another hash for it ({where})",
                )  # fmt: skip
        chain.version, chain.hash, chain.id = version, hash, envelope.id

    async def _body(self, envelope: Envelope, where: str) -> None:
        body: bytes | msgspec.Raw = envelope.body
        if envelope.blob:
            if envelope.blob in self.blobs:
                return
            try:
                body = await self.log.get_blob(envelope.blob)
            except LogError as error:
                self._add("blob", envelope.stream, envelope.version, envelope.id, f"{error} ({where})")
                return
            self.blobs.add(envelope.blob)
        try:
            decode_event(envelope.type, body)
        except msgspec.MsgspecError as error:
            self._add(
                "unreadable", envelope.stream, envelope.version, envelope.id,
                f"its body is no valid {envelope.type}: {error} ({where})",
            )  # fmt: skip

    def end(self, expected: dict[tuple[str, int], set[str]]) -> None:
        for stream, chain in self.chains.items():
            for version in sorted(chain.gaps):
                self._add(
                    "missing", stream, version, "", f"the stream goes on to event {chain.version} without it"
                )
        for (stream, version), hashes in expected.items():
            chain_or_none = self.chains.get(stream)
            if not hashes or (chain_or_none is not None and version in chain_or_none.gaps):
                continue
            if chain_or_none is not None and version <= chain_or_none.version:
                detail = "it was acknowledged, but another event stands at its version"
                self._add("missing", stream, version, "", detail)
            else:
                self._add("missing", stream, version, "", "the ledger says that it was acknowledged")

    def _add(self, kind: str, stream: str, version: int, event: str, detail: str) -> None:
        self.problems.append(Problem(kind, stream, version, event, detail))


def _read_ledger(path: Path, run: str | None) -> dict[tuple[str, int], set[str]]:
    expected: dict[tuple[str, int], set[str]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"the ledger {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = msgspec.json.decode(line, type=_LedgerLine)
        except msgspec.DecodeError as error:
            if number == len(lines) and not re.search(rb"}\s*$", line):
                break  # its writer died in the middle of the line
            raise ConfigError(f"{path}, line {number}, is no ledger line: {error}") from error
        if run is None or run_of(entry.stream) == run:
            expected.setdefault((entry.stream, entry.version), set()).add(entry.hash)
    return expected
