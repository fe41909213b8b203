"""The tools' own ledger: which effect did what to a workspace, so that a repeated call is never applied twice.

A journal is one file of JSON lines beside the workspace folder (`<workspace>.journal.jsonl`), each line fsynced. A
mutation goes through four steps, and a process may die between any two of them:

1. *stage*: the new content of every file is written to `<workspace>.staged/`;
2. *intent*: a line names the effect, its changes (paths, digests before and after) and its result text;
3. *apply*: each change is one atomic rename. A written file's staged copy is thereby gone, a deleted file is thereby
   staged, so the staged folder alone tells which changes happened, whatever was done to those paths since;
4. *applied*: a line ends the effect, and the staged remains are removed.

A second call with the same effect id finishes what is missing from 3 and 4 and returns the stored result text.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from nexactor.tools.protocol import ToolError


class Change(msgspec.Struct, frozen=True):
    """What an effect does to one path (relative, posix). A digest is SHA-256 hex of the content, None: no such file."""

    path: str
    before: str | None
    after: str | None


class Intent(msgspec.Struct, frozen=True, tag="intent", tag_field="line"):
    """An effect is about to be applied; everything needed to apply it is staged."""

    effect_id: str
    tool: str
    changes: tuple[Change, ...]
    result: str
    time_ns: int


class Applied(msgspec.Struct, frozen=True, tag="applied", tag_field="line"):
    """An effect took place. A second such line of one effect would mean that it took place twice."""

    effect_id: str
    tool: str
    time_ns: int


Line = Intent | Applied
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class Edit(msgspec.Struct, frozen=True):
    """One file to write (`content`) or to delete (None). `path` is absolute and inside the workspace."""

    path: Path
    content: bytes | None


class Plan(msgspec.Struct, frozen=True):
    """All edits of one effect, applied in this order, and the result text of the call."""

    edits: tuple[Edit, ...]
    result: str


class EffectJournal:
    """The ledger of one workspace. Safe between threads and processes (a lock on the journal file)."""

    def __init__(self, workspace: Path, *, at: Callable[[str], None] | None = None) -> None:
        """`at` is called with the name of each step just reached; tests raise from it, as a crash would."""
        self.workspace = workspace
        self.path = journal_path(workspace)
        self._staged = workspace.with_name(f"{workspace.name}.staged")
        self._at = at or (lambda _step: None)

    def perform(self, effect_id: str, tool: str, plan: Callable[[], Plan]) -> str:
        """Apply `plan()` once for this effect id, however often called; returns the result text.

        `plan` is called under the lock and only if this effect has no intent yet; it may raise ToolError, and then
        nothing is journalled. An empty effect id is taken as a new effect.
        """
        effect_id = effect_id or uuid.uuid4().hex
        with self._locked() as file:
            intent, applied = self._find(file, effect_id)
            if intent is None:
                if applied:
                    raise ToolError(f"effect {effect_id} was already made by a tool that keeps no result")
                intent = self._prepare(file, effect_id, tool, plan())
            elif intent.tool != tool:
                raise ToolError(f"effect {effect_id} belongs to {intent.tool}, not to {tool}")
            if not applied:
                for ordinal, change in enumerate(intent.changes):
                    self._apply(effect_id, ordinal, change)
                    self._at(f"changed {ordinal}")
                _write(file, Applied(effect_id, tool, time.time_ns()))
                self._at("applied")
            self._clean(effect_id, len(intent.changes))
            return intent.result

    def record(self, effect_id: str, tool: str) -> None:
        """Note an effect that cannot be made idempotent (a shell command) just before it happens."""
        with self._locked() as file:
            _write(file, Applied(effect_id or uuid.uuid4().hex, tool, time.time_ns()))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        created = not self.path.exists()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if created:
                _sync_folder(self.path.parent)
            data = _read(file)
            whole = data.rfind(b"\n") + 1
            if whole < len(data):  # a writer died inside its last line: that line never was
                os.ftruncate(file, whole)
            yield file
        finally:
            os.close(file)

    def _find(self, file: int, effect_id: str) -> tuple[Intent | None, bool]:
        key = msgspec.json.encode(effect_id)
        intent, applied = None, False
        for raw in _read(file).splitlines():
            if key not in raw:  # decoding only this effect's lines keeps a long journal quick
                continue
            line = _decoder.decode(raw)
            if line.effect_id != effect_id:
                continue
            if isinstance(line, Intent):
                intent = line
            else:
                applied = True
        return intent, applied

    def _prepare(self, file: int, effect_id: str, tool: str, plan: Plan) -> Intent:
        self._staged.mkdir(exist_ok=True)
        changes = []
        for ordinal, edit in enumerate(plan.edits):
            before = _digest_of(edit.path)
            after = None
            self._staged_path(effect_id, ordinal).unlink(missing_ok=True)  # left by a crash before the intent
            if edit.content is not None:
                after = hashlib.sha256(edit.content).hexdigest()
                self._stage(self._staged_path(effect_id, ordinal), edit)
            changes.append(Change(edit.path.relative_to(self.workspace).as_posix(), before, after))
        _sync_folder(self._staged)
        self._at("staged")
        intent = Intent(effect_id, tool, tuple(changes), plan.result, time.time_ns())
        _write(file, intent)
        self._at("intent")
        return intent

    def _stage(self, staged: Path, edit: Edit) -> None:
        assert edit.content is not None
        with open(staged, "wb") as file:
            file.write(edit.content)
            file.flush()
            os.fsync(file.fileno())
        if edit.path.exists():
            shutil.copymode(edit.path, staged)

    def _apply(self, effect_id: str, ordinal: int, change: Change) -> None:
        path = self.workspace / change.path
        staged = self._staged_path(effect_id, ordinal)
        if change.after is not None:
            if not staged.exists():
                return  # renamed into place before the crash
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, path)
        else:
            if staged.exists() or not path.exists():
                return
            os.replace(path, staged)
        _sync_folder(path.parent)

    def _clean(self, effect_id: str, count: int) -> None:
        for ordinal in range(count):
            self._staged_path(effect_id, ordinal).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._staged.rmdir()

    def _staged_path(self, effect_id: str, ordinal: int) -> Path:
        return self._staged / f"{hashlib.sha256(effect_id.encode()).hexdigest()[:32]}-{ordinal}"


def journal_path(workspace: Path) -> Path:
    """Where the journal of a workspace lies: beside it, out of reach of its tools."""
    return workspace.with_name(f"{workspace.name}.journal.jsonl")


def read_journal(path: Path) -> list[Line]:
    """All whole lines of a journal, oldest first; none if the file does not exist."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [_decoder.decode(raw) for raw in data[: data.rfind(b"\n") + 1].splitlines()]


def count_applied(path: Path) -> dict[str, int]:
    """How often each effect in the journal at `path` took place, by effect id: a 2 is an effect made twice."""
    return dict(Counter(line.effect_id for line in read_journal(path) if isinstance(line, Applied)))


def unfinished(path: Path) -> Sequence[str]:
    """Effects with an intent and no applied line: their process died, and nobody has repeated the call yet."""
    lines = read_journal(path)
    applied = {line.effect_id for line in lines if isinstance(line, Applied)}
    return [line.effect_id for line in lines if isinstance(line, Intent) and line.effect_id not in applied]


def _read(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _write(file: int, line: Line) -> None:
    data = memoryview(msgspec.json.encode(line) + b"\n")
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _digest_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
