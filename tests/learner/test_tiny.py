"""The tiny random policy."""

from __future__ import annotations

from pathlib import Path

from nexactor.learner.tiny import make_tiny_policy
from nexactor.learner.weights import Policy, folder_digest


def test_a_seed_gives_the_same_bytes_every_time(tiny_folder: Path, tmp_path: Path) -> None:
    make_tiny_policy(tmp_path / "again")
    make_tiny_policy(tmp_path / "other", seed=1)
    assert folder_digest(tmp_path / "again") == folder_digest(tiny_folder)
    assert folder_digest(tmp_path / "other") != folder_digest(tiny_folder)


def test_it_is_small_and_every_row_has_a_token(tiny: Policy, tiny_folder: Path) -> None:
    assert sum(p.stat().st_size for p in tiny_folder.iterdir()) < 1_000_000
    assert tiny.config.vocab == tiny.tokenizer.vocab
    assert all(tiny.tokenizer.decode([i]) for i in range(tiny.config.vocab))
