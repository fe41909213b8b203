"""Policies that the learner's tests share: a tiny random one, and the real SmolLM2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.learner.weights import Policy


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny random policy; do not write into it."""
    from nexactor.learner.tiny import make_tiny_policy

    folder = tmp_path_factory.mktemp("policies") / "tiny"
    make_tiny_policy(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Policy:
    from nexactor.learner.weights import load_policy

    return load_policy(tiny_folder)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The real model's GGUF: $NEXACTOR_SMOLLM2 (file or folder), or fetched once into the cache."""
    from nexactor.learner.fetch import get_policy

    try:
        given = os.environ.get("NEXACTOR_SMOLLM2")
        path = Path(given) if given else get_policy("smollm2-135m")
    except ConfigError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    return path if path.suffix == ".gguf" else next(path.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Policy:
    from nexactor.learner.weights import load_policy

    return load_policy(smollm2_file)
