"""The journal of kept answers: nothing told that is not on disk, nothing lost, damage outlived."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nexactor.events.errors import NexactorError
from nexactor.events.messages import Message, ToolCall
from nexactor.learner.answers import Answer, AnswerJournal, count_generations, read_answers


def answer(call_id: str, text: str = "yes\n\u2028 done") -> Answer:
    return Answer(
        call_id=call_id,
        request="r",
        prompt_ids=[1, 2, 3],
        ids=[4, 5],
        logprobs=[-0.1, -2.5],
        text=text,
        finish_reason="stop",
        policy_version="v1",
        time=1,
        message=Message("assistant", text, (ToolCall("c-0", "f", '{"a": 1}'),)),
    )


async def keep(journal: AnswerJournal, *call_ids: str) -> None:
    for call_id in call_ids:
        await journal.keep(answer(call_id))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*.jsonl"))


async def test_an_answer_is_found_again_also_after_a_restart(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    await keep(journal, "agent/r@1.0", "agent/r@2.0")
    assert journal.get("agent/r@1.0") == answer("agent/r@1.0")
    assert journal.get("agent/r@9.0") is None
    journal.close()
    again = AnswerJournal(tmp_path)
    assert len(again) == 2
    assert again.get("agent/r@2.0") == answer("agent/r@2.0")
    again.close()


async def test_an_answer_is_on_disk_when_keep_returns(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    await journal.keep(answer("a"))
    assert list(read_answers(tmp_path)) == [answer("a")]
    journal.close()


async def test_answers_that_come_together_share_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    journal = AnswerJournal(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    await asyncio.gather(*(journal.keep(answer(str(i))) for i in range(50)))
    assert len(journal) == 50
    assert len(synced) <= 2
    journal.close()


@pytest.mark.parametrize("cut", [1, 10, 200])
async def test_a_torn_last_line_is_cut_off_and_writing_goes_on(tmp_path: Path, cut: int) -> None:
    journal = AnswerJournal(tmp_path)
    await keep(journal, "a", "b")
    journal.close()
    [path] = segments(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = AnswerJournal(tmp_path)
    assert "a" in again
    assert "b" not in again
    await keep(again, "c")
    again.close()
    assert count_generations(tmp_path) == {"a": 1, "c": 1}


async def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    await keep(journal, "a", "b", "c")
    journal.close()
    [path] = segments(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{garbage" + b"\xff" * 20 + b"\n" + lines[2])
    again = AnswerJournal(tmp_path)
    assert again.get("a") == answer("a")
    assert again.get("c") == answer("c")
    assert "b" not in again
    again.close()


async def test_generations_are_counted_by_call_id(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    await keep(journal, "a", "b", "a")
    assert count_generations(tmp_path) == {"a": 2, "b": 1}
    journal.close()


async def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path, max_answers=16)
    await keep(journal, *(str(i) for i in range(40)))
    assert len(journal) <= 16
    assert "39" in journal
    assert "0" not in journal
    journal.close()
    again = AnswerJournal(tmp_path, max_answers=16)
    assert again.get("39") == answer("39")
    assert len(again) <= 16
    again.close()


async def test_the_oldest_go_when_they_take_too_much_room(tmp_path: Path) -> None:
    limit = 20_000
    journal = AnswerJournal(tmp_path, max_bytes=limit)
    await keep(journal, *(str(i) for i in range(200)))
    assert sum(p.stat().st_size for p in segments(tmp_path)) <= limit * 9 / 8
    assert "199" in journal
    assert len(journal) > 10
    journal.close()


async def test_a_journal_has_one_owner(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    with pytest.raises(NexactorError, match="in use"):
        AnswerJournal(tmp_path)
    journal.close()
    AnswerJournal(tmp_path).close()


async def test_a_full_disk_is_told_to_all_who_wait_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = AnswerJournal(tmp_path)
    await keep(journal, "a")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        results = await asyncio.gather(*(journal.keep(answer(i)) for i in "bc"), return_exceptions=True)
    assert all(isinstance(r, OSError) for r in results)
    await keep(journal, "d")
    journal.close()
    assert count_generations(tmp_path) == {"a": 1, "d": 1}


async def test_a_caller_that_gives_up_does_not_take_the_others_along(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    tasks = [asyncio.create_task(journal.keep(answer(i))) for i in "abc"]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert count_generations(tmp_path) == {"a": 1, "b": 1, "c": 1}
    assert not tasks[1].cancelled()
    journal.close()
