"""The workspace environment: the same tasks always, disjoint splits, and a checker that is not fooled."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from nexactor.events.errors import ConfigError
from nexactor.tools.environment import Environment, EnvironmentFault, Task
from nexactor.tools.workspace import SPLITS, Workspace, changed_paths, scene_of, task_digest
from nexactor.tools.workspace_families import FAMILIES, FIRST, SECOND, recognise

workspace: Environment = Workspace()
MANY = 1200


def finish(task: Task, folder: Path) -> None:
    """Make the folder what it should become, without any tool."""
    shutil.rmtree(folder)
    folder.mkdir()
    for path, text in scene_of(task).expected.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def one_of_each() -> list[Task]:
    return [*workspace.tasks("train", len(FAMILIES) - 1), *workspace.tasks("novel", 1)]


def test_tasks_are_always_the_same() -> None:
    assert workspace.tasks("train", 40) == workspace.tasks("train", 60)[:40]
    assert workspace.tasks("heldout", 10, 30) == workspace.tasks("heldout", 40)[30:]
    first = workspace.tasks("train", 1)[0]
    assert (first.id, first.prompt) == (
        "workspace/train/write/0",
        "Write 'slow brush' to the new file loan.log.",
    )


def test_any_stretch_of_a_split_holds_its_families_in_equal_parts() -> None:
    families = [task.family for task in workspace.tasks("train", 33, 5)]
    assert {families.count(f) for f in set(families)} == {3}
    assert {task.family for task in workspace.tasks("novel", 5)} == {"find_copy"}


def test_train_and_held_out_share_no_seed_no_task_and_no_content() -> None:
    tasks = {split: workspace.tasks(split, MANY) for split in SPLITS}
    for a, b in (("train", "heldout"), ("train", "novel"), ("heldout", "novel")):
        assert not {t.seed for t in tasks[a]} & {t.seed for t in tasks[b]}
        assert not {t.id for t in tasks[a]} & {t.id for t in tasks[b]}
        assert not {t.prompt for t in tasks[a]} & {t.prompt for t in tasks[b]}
        assert not {task_digest(t) for t in tasks[a]} & {task_digest(t) for t in tasks[b]}


def test_no_held_out_task_is_a_trained_one_in_other_words() -> None:
    def meaning(task: Task) -> bytes:
        return msgspec.json.encode((task.family, scene_of(task).values), order="sorted")

    trained = {meaning(task) for task in workspace.tasks("train", MANY)}
    assert not trained & {meaning(task) for task in workspace.tasks("heldout", MANY)}


def test_every_prompt_is_read_as_the_family_and_the_values_it_was_made_from() -> None:
    for split in SPLITS:
        for task in workspace.tasks(split, 600):
            recognised = recognise(task.prompt)
            assert recognised is not None
            assert (recognised[0].name, recognised[1]) == (task.family, scene_of(task).values)


def test_no_word_hides_in_another_so_that_a_search_finds_one_line() -> None:
    words = [*FIRST, *SECOND]
    assert len(set(words)) == len(words)
    assert [(a, b) for a in SECOND for b in words if a != b and a in b] == []
    for task in workspace.tasks("train", 300):
        scene = scene_of(task)
        if needle := scene.values.get("needle"):
            assert sum(needle in line for text in scene.files.values() for line in text.splitlines()) == 1


def test_prompts_and_files_are_short() -> None:
    for task in [*workspace.tasks("train", 300), *workspace.tasks("novel", 30)]:
        assert len(task.prompt) <= 120
        for text in scene_of(task).files.values():
            assert text.endswith("\n")
            assert len(text.splitlines()) <= 5


def test_doing_nothing_never_succeeds_and_earns_nothing(tmp_path: Path) -> None:
    for split in SPLITS:
        for task in workspace.tasks(split, 200):
            assert workspace.score(task, workspace.reset(task, tmp_path), "done").reward == 0.0


@pytest.mark.parametrize("task", one_of_each(), ids=lambda t: t.family)
def test_the_right_outcome_scores_one(tmp_path: Path, task: Task) -> None:
    folder = workspace.reset(task, tmp_path)
    finish(task, folder)
    score = workspace.score(task, folder, "")
    assert score.success
    assert score.reward == 1.0
    assert set(score.parts.values()) == {1.0}


@pytest.mark.parametrize(
    "damage", ["extra file", "other file changed", "other file gone", "newline missing", "link"]
)
@pytest.mark.parametrize("task", one_of_each(), ids=lambda t: t.family)
def test_a_wrong_outcome_is_no_success(tmp_path: Path, task: Task, damage: str) -> None:
    folder = workspace.reset(task, tmp_path)
    finish(task, folder)
    expected = scene_of(task).expected
    kept = sorted(set(expected) - set(changed_paths(scene_of(task))))
    written = sorted(set(expected) & set(changed_paths(scene_of(task))))
    if damage == "extra file":
        (folder / "extra.txt").touch()
    elif damage == "link":
        (folder / "extra").symlink_to(folder, target_is_directory=True)
    elif damage == "newline missing":
        path = folder / (written or kept)[0]
        path.write_text(path.read_text().removesuffix("\n"))
    elif damage == "other file changed":
        (folder / kept[0]).write_text("x\n")
    else:
        (folder / kept[0]).unlink()
    score = workspace.score(task, folder, "done")
    assert not score.success
    assert score.reward <= 0.5


def test_part_of_the_work_earns_part_of_half_the_reward(tmp_path: Path) -> None:
    task = next(t for t in workspace.tasks("train", 11) if t.family == "count_move")
    scene = scene_of(task)
    folder = workspace.reset(task, tmp_path)
    target = scene.values["target"]
    (folder / target).write_text(scene.expected[target])
    score = workspace.score(task, folder, "done")
    assert score.reward == pytest.approx(0.5 / 3)
    assert score.parts[target] == score.parts["nothing else changed"] == 1.0
    (folder / "extra.txt").touch()
    assert workspace.score(task, folder, "done").reward == 0.0


def test_a_reset_again_leaves_what_agents_did(tmp_path: Path) -> None:
    task = workspace.tasks("train", 1)[0]
    folder = workspace.reset(task, tmp_path / "deep" / "root")
    (folder / "new.txt").write_text("x")
    assert workspace.reset(task, tmp_path / "deep" / "root") == folder
    assert (folder / "new.txt").exists()
    assert {p.name for p in folder.parent.iterdir()} == {folder.name}


def test_infrastructure_trouble_is_no_zero(tmp_path: Path) -> None:
    task = workspace.tasks("train", 1)[0]
    with pytest.raises(EnvironmentFault, match="does not exist"):
        workspace.score(task, tmp_path / "gone", "")
    folder = workspace.reset(task, tmp_path)
    with pytest.raises(EnvironmentFault, match="made by another version"):
        workspace.score(msgspec.structs.replace(task, prompt="Other."), folder, "")
    with pytest.raises(EnvironmentFault, match="not a task of the workspace"):
        workspace.score(msgspec.structs.replace(task, env="other"), folder, "")


def test_an_unknown_split_or_too_many_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="no split 'test'; there are train, heldout, novel"):
        workspace.tasks("test", 1)
    with pytest.raises(ConfigError, match="not among them"):
        workspace.tasks("train", 2, 9_999_999)
