"""Checkpoints: weights, optimizer, step, randomness AND the place in the log, committed together (orbax).

Because state and place are one atomic commit, a learner killed at any moment goes on from a moment at which
both were true. Each checkpoint is a folder named by its step; orbax writes it beside its place and renames
it. What a disk damages is found by checksums, and the checkpoint before it is used.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from orbax.checkpoint import v1 as ocp

from nexactor.events.errors import ConfigError
from nexactor.events.trajectory import AssemblerState

logger = logging.getLogger(__name__)


class Place(msgspec.Struct, frozen=True):
    """Where in the log's order of batches a learner is.

    `log` is the assembler's state before the current window of batches and `counts` what had been counted by
    then, `window` is its number, `done` the steps taken in it. `until` is the last position to read for a
    learner that does not follow the log (0: no limit).
    """

    log: AssemblerState = AssemblerState()
    counts: dict[str, int] = {}
    window: int = 0
    done: int = 0
    until: int = 0


class Saved(msgspec.Struct, frozen=True):
    """What a checkpoint holds beside the state. `identity`: settings that decide the order of batches."""

    step: int
    place: Place
    identity: dict[str, Any]
    checksums: tuple[int, ...] = ()


class Checkpoints:
    """The checkpoints of one learner in `folder`, at most `keep` of them."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(p.name)
            for p in self.folder.iterdir()
            if p.name.isdecimal() and (p / "commit_success.txt").exists()
        )

    def save(self, state: Any, saved: Saved) -> Path:
        """Commit a checkpoint, then remove those beyond `keep`. Returns its folder once it is durable."""
        saved = msgspec.structs.replace(saved, checksums=_checksums(state))
        path = (self.folder / str(saved.step)).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"json": np.frombuffer(msgspec.json.encode(saved), np.uint8)}
        # Not in the background: the next step reuses the state's buffers.
        ocp.save_checkpointables(path, {"state": state, "place": meta}, overwrite=True)
        for step in self.steps()[: -self._keep]:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
        return path

    def load(self, like: Any) -> tuple[Any, Saved] | None:
        """The newest checkpoint that can be read whole, or None if there is none at all.

        `like` is the state's shape (arrays or jax.ShapeDtypeStruct). A damaged checkpoint is reported and the
        one before it is taken. Raises ConfigError if none of those there can be read.
        """
        abstract = jax.tree.map(_abstract, like)
        errors = []
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            try:
                loaded = ocp.load_checkpointables(path.absolute(), {"state": abstract, "place": None})
                saved = msgspec.json.decode(np.asarray(loaded["place"]["json"]).tobytes(), type=Saved)
                if _checksums(loaded["state"]) != saved.checksums:
                    raise ValueError("the weights do not match their checksums")
            except Exception as error:  # orbax and tensorstore raise whatever the damage makes them meet
                reason = str(error).strip().splitlines()
                errors.append(f"{path}: {type(error).__name__}: {reason[0][:200] if reason else ''}")
                logger.warning("checkpoint %s cannot be used; trying the one before it", errors[-1])
                continue
            return loaded["state"], saved
        if errors:
            raise ConfigError(
                f"no checkpoint in {self.folder} can be read:\n  "
                + "\n  ".join(errors)
                + "\nIf the policy was changed to another model, give the learner another `out`. Otherwise the "
                "files are damaged: move the folder away; the learner then trains again from the log, to the "
                "same weights"
            )
        return None


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _checksums(state: Any) -> tuple[int, ...]:
    """CRC-32 of every leaf's bytes: a gigabyte a second, and enough against damage (not against malice)."""
    leaves = (np.ascontiguousarray(leaf).reshape(-1) for leaf in jax.tree.leaves(state))
    return tuple(
        zlib.crc32(leaf.view(np.uint8).data) for leaf in leaves
    )  # as bytes: bfloat16 has no buffer format
