"""What an environment is: seeded tasks over real state, and a checker that scores the state at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from nexactor.events.errors import NexactorError


class EnvironmentFault(NexactorError):
    """The environment itself failed (a folder is missing, a checker broke): a run is not scored, rather than 0."""


class Task(msgspec.Struct, frozen=True):
    """One task. `id` is unique over all environments; `prompt` is what the root agent is told."""

    id: str
    env: str
    split: str
    family: str
    seed: int
    prompt: str


class Score(msgspec.Struct, frozen=True):
    """A verdict. `reward` is in [0, 1] and 1 means success; `parts` name what it was made of, each in [0, 1]."""

    reward: float
    parts: Mapping[str, float]

    @property
    def success(self) -> bool:
        """Was everything right?"""
        return self.reward >= 1.0


class Environment(Protocol):
    """Seeded tasks, their start states and their checker. The tools are those of the agent that takes the task."""

    @property
    def name(self) -> str:
        """Its name on the command line and in task ids."""
        ...

    def tasks(self, split: str, count: int, offset: int = 0) -> Sequence[Task]:
        """Tasks number `offset` to `offset + count - 1` of a split: always the same. ConfigError: unknown split."""
        ...

    def reset(self, task: Task, root: Path) -> Path:
        """Make the task's start state in a folder below `root` and return that folder.

        Idempotent: if the folder is there already (a driver that was restarted), it is returned as it is, with
        whatever agents have done in it since.
        """
        ...

    def score(self, task: Task, workspace: Path, answer: str) -> Score:
        """Judge the end state (`answer`: the root agent's last text). Raises rather than score 0 for infra trouble."""
        ...
