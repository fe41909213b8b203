"""Checkpoints: state and place together, newest whole one taken, damage found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nexactor.events.errors import ConfigError
from nexactor.events.trajectory import AssemblerState
from nexactor.learner.checkpoint import Checkpoints, Place, Saved

pytestmark = [
    pytest.mark.usefixtures("orbax_leftovers"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def a_state(value: float = 1.0) -> dict[str, Any]:
    return {
        "w": jnp.full((8, 4), value, jnp.float32),
        "b": jnp.full((4,), value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def a_place(step: int) -> Saved:
    log = AssemblerState(5, 9, ("r1", "r2"), {"runs": 2})
    return Saved(step, Place(log, {"samples": 3}, 1, 2, 7), {"batch": 2})


def test_state_and_place_come_back_together(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(a_state(3), a_place(3))
    loaded = checkpoints.load(a_state(0))
    assert loaded is not None
    state, saved = loaded
    assert (saved.step, saved.place, saved.identity) == (3, a_place(3).place, {"batch": 2})
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(a_state(3)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "c").load(a_state()) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 10):
        checkpoints.save(a_state(step), a_place(step))
    assert checkpoints.steps() == [4, 10]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(2))
    checkpoints.save(a_state(5), a_place(2))
    loaded = checkpoints.load(a_state())
    assert loaded is not None
    assert float(loaded[0]["step"]) == 5


def damage(folder: Path) -> None:
    """Change one byte in the middle of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(1))
    checkpoints.save(a_state(2), a_place(2))
    damage(tmp_path / "2")
    loaded = checkpoints.load(a_state())
    assert loaded is not None
    assert loaded[1].step == 1
    assert str(tmp_path / "2") in caplog.text


def test_where_all_are_damaged_the_error_names_folder_and_way_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(1))
    damage(tmp_path / "1")
    with pytest.raises(ConfigError, match="move the folder away") as error:
        checkpoints.load(a_state())
    assert str(tmp_path) in str(error.value)


def test_weights_that_do_not_match_their_checksums_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(1))
    monkeypatch.setattr("nexactor.learner.checkpoint._checksums", lambda state: (0,))
    with pytest.raises(ConfigError, match="checksums"):
        checkpoints.load(a_state())


def test_an_uncommitted_checkpoint_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3").mkdir()
    assert checkpoints.steps() == [1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1), a_place(1))
    with pytest.raises(ConfigError, match="another model"):
        checkpoints.load({**a_state(), "w": jnp.zeros((3, 3))})
