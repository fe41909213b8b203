"""An effect is applied once, wherever its process dies."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexactor.tools import ToolError
from nexactor.tools.journal import (
    Applied,
    Edit,
    EffectJournal,
    Intent,
    Plan,
    count_applied,
    journal_path,
    read_journal,
    unfinished,
)

STEPS = ("staged", "intent", "changed 0", "changed 1", "applied")


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "ws"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n")
    return folder


def crashing(workspace: Path, step: str) -> EffectJournal:
    def at(reached: str) -> None:
        if reached == step:
            raise Crash

    return EffectJournal(workspace, at=at)


def move(workspace: Path) -> Plan:
    source = workspace / "a.txt"
    return Plan((Edit(workspace / "b" / "a.txt", source.read_bytes()), Edit(source, None)), "moved")


def append(workspace: Path) -> Plan:
    file = workspace / "a.txt"
    return Plan((Edit(file, file.read_bytes() + b"two\n"),), "added")


def contents(workspace: Path) -> dict[str, str]:
    return {str(f.relative_to(workspace)): f.read_text() for f in workspace.rglob("*") if f.is_file()}


@pytest.mark.parametrize("step", STEPS)
def test_a_move_that_died_at_any_step_is_finished_once_by_its_retry(workspace: Path, step: str) -> None:
    with pytest.raises(Crash):
        crashing(workspace, step).perform("e", "move", lambda: move(workspace))
    for _ in range(2):
        assert EffectJournal(workspace).perform("e", "move", lambda: move(workspace)) == "moved"
    assert contents(workspace) == {"b/a.txt": "one\n"}
    assert count_applied(journal_path(workspace)) == {"e": 1}
    assert not workspace.with_name("ws.staged").exists()


@pytest.mark.parametrize("step", [s for s in STEPS if s != "changed 1"])
def test_an_append_that_died_at_any_step_is_applied_once_by_its_retry(workspace: Path, step: str) -> None:
    with pytest.raises(Crash):
        crashing(workspace, step).perform("e", "append", lambda: append(workspace))
    assert EffectJournal(workspace).perform("e", "append", lambda: append(workspace)) == "added"
    assert contents(workspace) == {"a.txt": "one\ntwo\n"}
    assert count_applied(journal_path(workspace)) == {"e": 1}


def test_a_retry_does_not_undo_what_was_done_to_the_file_since(workspace: Path) -> None:
    with pytest.raises(Crash):
        crashing(workspace, "changed 0").perform("e1", "append", lambda: append(workspace))
    (workspace / "a.txt").write_text("someone else\n")
    EffectJournal(workspace).perform("e1", "append", lambda: append(workspace))
    assert contents(workspace) == {"a.txt": "someone else\n"}


def test_writing_the_same_content_again_is_still_known_to_have_been_applied(workspace: Path) -> None:
    def same() -> Plan:
        return Plan((Edit(workspace / "a.txt", b"one\n"),), "same")

    with pytest.raises(Crash):
        crashing(workspace, "changed 0").perform("e", "write", same)
    (workspace / "a.txt").unlink()
    EffectJournal(workspace).perform("e", "write", same)
    assert contents(workspace) == {}


def test_different_effects_are_applied_each(workspace: Path) -> None:
    for effect in ("e1", "e2", "", ""):
        EffectJournal(workspace).perform(effect, "append", lambda: append(workspace))
    assert contents(workspace)["a.txt"] == "one\n" + "two\n" * 4


def test_a_plan_that_fails_leaves_no_trace(workspace: Path) -> None:
    def plan() -> Plan:
        raise ToolError("no")

    with pytest.raises(ToolError):
        EffectJournal(workspace).perform("e", "move", plan)
    assert read_journal(journal_path(workspace)) == []
    assert EffectJournal(workspace).perform("e", "move", lambda: move(workspace)) == "moved"


def test_the_journal_says_what_changed_by_digest(workspace: Path) -> None:
    EffectJournal(workspace).perform("e", "move", lambda: move(workspace))
    intent, applied = read_journal(journal_path(workspace))
    assert isinstance(intent, Intent)
    assert isinstance(applied, Applied)
    to, gone = intent.changes
    assert (to.path, to.before, gone.path, gone.after) == ("b/a.txt", None, "a.txt", None)
    assert to.after == gone.before
    assert len(to.after or "") == 64


def test_an_effect_without_its_applied_line_is_listed_as_unfinished(workspace: Path) -> None:
    with pytest.raises(Crash):
        crashing(workspace, "intent").perform("e", "move", lambda: move(workspace))
    assert list(unfinished(journal_path(workspace))) == ["e"]
    EffectJournal(workspace).perform("e", "move", lambda: move(workspace))
    assert list(unfinished(journal_path(workspace))) == []


def test_an_effect_id_belongs_to_one_tool(workspace: Path) -> None:
    EffectJournal(workspace).perform("e", "append", lambda: append(workspace))
    with pytest.raises(ToolError, match="belongs to append, not to move"):
        EffectJournal(workspace).perform("e", "move", lambda: move(workspace))


def test_a_recorded_effect_counts_each_time_it_happens(workspace: Path) -> None:
    EffectJournal(workspace).record("e", "shell")
    EffectJournal(workspace).record("e", "shell")
    assert count_applied(journal_path(workspace)) == {"e": 2}


def test_a_journal_that_is_not_there_counts_nothing(tmp_path: Path) -> None:
    assert count_applied(tmp_path / "none.jsonl") == {}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(min_value=1, max_value=500), effects=st.integers(min_value=1, max_value=3))
def test_a_line_torn_by_a_crash_never_was(
    tmp_path_factory: pytest.TempPathFactory, cut: int, effects: int
) -> None:
    workspace = tmp_path_factory.mktemp("torn") / "ws"
    workspace.mkdir()
    (workspace / "a.txt").write_text("one\n")
    for effect in range(effects):
        EffectJournal(workspace).perform(f"e{effect}", "append", lambda: append(workspace))
    path = journal_path(workspace)
    before = read_journal(path)
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with open(path, "ab") as file:
        file.write(last[: min(cut, len(last) - 1)])
    assert read_journal(path) == before
    EffectJournal(workspace).perform("new", "append", lambda: append(workspace))
    assert count_applied(path) == {**{f"e{e}": 1 for e in range(effects)}, "new": 1}


def _append_many(workspace: Path, name: str) -> None:
    for number in range(10):
        EffectJournal(workspace).perform(f"{name}{number}", "append", lambda: append(workspace))


def test_processes_take_turns(workspace: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_append_many, args=(workspace, name)) for name in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert contents(workspace)["a.txt"] == "one\n" + "two\n" * 20
    assert sum(count_applied(journal_path(workspace)).values()) == 20
