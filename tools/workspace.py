"""The workspace environment: seeded tasks over a real folder, and a checker that inspects that folder.

Splits: `train` and `heldout` share families and phrasings but no task: their seeds come from disjoint ranges, and the
values of a task (names, texts) are hashed into one of the two, so that the same task cannot turn up in both under
another phrasing or seed. `novel` is a family that is never trained on.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import stat
import tempfile
from functools import lru_cache
from pathlib import Path

import msgspec

from nexactor.events.errors import ConfigError
from nexactor.tools.environment import EnvironmentFault, Score, Task
from nexactor.tools.workspace_families import BY_NAME, FAMILIES, Family, Scene

SPLITS = {"train": 0, "heldout": 10_000_000, "novel": 20_000_000}
"""Split to its first seed; a split has SPLIT_SIZE seeds."""
SPLIT_SIZE = 10_000_000

_NAME = "workspace"
_PARTIAL = 0.5


class Workspace:
    """Small jobs on text files: create, edit, move, search, count and combine. One to four tool calls each."""

    name = _NAME

    def tasks(self, split: str, count: int, offset: int = 0) -> list[Task]:
        """Tasks `offset` to `offset + count - 1`: families in turn, so that any stretch is balanced."""
        if split not in SPLITS:
            raise ConfigError(
                f"the workspace environment has no split {split!r}; there are {', '.join(SPLITS)}"
            )
        if not 0 <= offset <= offset + count <= SPLIT_SIZE:
            raise ConfigError(
                f"split {split} has {SPLIT_SIZE} tasks; {count} from {offset} on are not among them"
            )
        families = [f for f in FAMILIES if f.novel == (split == "novel")]
        return [
            self.task(split, families[i % len(families)].name, SPLITS[split] + i)
            for i in range(offset, offset + count)
        ]

    def task(self, split: str, family: str, seed: int) -> Task:
        """The task of a family and a seed of the split's range."""
        _, prompt = _draw(split, family, seed)
        return Task(f"{_NAME}/{split}/{family}/{seed}", _NAME, split, family, seed, prompt)

    def reset(self, task: Task, root: Path) -> Path:
        """The seeded folder of the task below `root`; left alone if it exists. OSError if it cannot be made."""
        workspace = root / re.sub(r"[^\w.-]", "-", task.id)
        if workspace.exists():
            return workspace
        root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        made.chmod(0o755)
        for path, text in scene_of(task).files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(text, encoding="utf-8", newline="")
        try:
            made.rename(workspace)  # whole or not at all, whenever this process dies
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not workspace.is_dir():
                raise
        return workspace

    def score(self, task: Task, workspace: Path, answer: str) -> Score:
        """1 if the folder holds exactly the expected files. Else half the share of wanted changes that were made,
        and nothing at all if any other file was changed, made or removed: doing nothing scores 0, so does damage.

        Raises EnvironmentFault if the folder cannot be read.
        """
        scene = scene_of(task)
        actual = _read(workspace)
        wanted = changed_paths(scene)
        parts = {path: float(actual.get(path) == _bytes(scene.expected.get(path))) for path in wanted}
        others = (set(actual) | set(scene.expected)) - set(wanted)
        intact = all(actual.get(path) == _bytes(scene.expected.get(path)) for path in others)
        share = sum(parts.values()) / len(parts)
        reward = 0.0 if not intact else 1.0 if share == 1.0 else share * _PARTIAL
        return Score(reward, {**parts, "nothing else changed": float(intact)})


def scene_of(task: Task) -> Scene:
    """The start files and the expected files of a task, made again from its seed.

    Raises EnvironmentFault for a task that is not of this environment, or was made by another version of it.
    """
    if task.env != _NAME or task.split not in SPLITS or task.family not in BY_NAME:
        raise EnvironmentFault(f"task {task.id} is not a task of the workspace environment")
    scene, prompt = _draw(task.split, task.family, task.seed)
    if prompt != task.prompt:
        raise EnvironmentFault(f"task {task.id} was made by another version: its prompt is not {prompt!r}")
    return scene


def task_digest(task: Task) -> str:
    """SHA-256 over what the task is (prompt, start files, expected files), whatever its id."""
    scene = scene_of(task)
    return hashlib.sha256(
        msgspec.json.encode((task.prompt, scene.files, scene.expected), order="sorted")
    ).hexdigest()


def changed_paths(scene: Scene) -> list[str]:
    """Paths whose expected content differs from the start: what a score is made of."""
    paths = scene.files.keys() | scene.expected.keys()
    return sorted(path for path in paths if scene.files.get(path) != scene.expected.get(path))


@lru_cache(maxsize=4096)
def _draw(split: str, family_name: str, seed: int) -> tuple[Scene, str]:
    family: Family = BY_NAME[family_name]
    generator = random.Random(f"{_NAME}/{family_name}/{seed}")
    while True:
        scene = family.make(generator)
        template = generator.choice(family.templates)
        if _side(family_name, scene) == ("train" if split == "train" else "heldout"):
            return scene, template.format(**scene.values)


def _side(family_name: str, scene: Scene) -> str:
    """One in four of all possible tasks is for holding out, by the hash of its values."""
    key = msgspec.json.encode((family_name, scene.values), order="sorted")
    return "heldout" if hashlib.sha256(key).digest()[0] % 4 == 0 else "train"


def _read(workspace: Path) -> dict[str, bytes]:
    """Every file of the folder; what is not a regular file is there, but equals nothing."""
    if not workspace.is_dir():
        raise EnvironmentFault(f"the workspace {workspace} does not exist: the run cannot be scored")
    found: dict[str, bytes] = {}

    def fault(error: OSError) -> None:
        raise EnvironmentFault(f"the workspace {workspace} cannot be read: {error}") from error

    for place, folders, names in os.walk(workspace, onerror=fault):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in [*names, *links]:
            file = Path(place, name)
            path = file.relative_to(workspace).as_posix()
            try:
                regular = stat.S_ISREG(file.lstat().st_mode)
                found[path] = file.read_bytes() if regular else b"\0not a regular file"
            except OSError as error:
                fault(error)
    return found


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
