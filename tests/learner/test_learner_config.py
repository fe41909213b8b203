"""The learner's YAML: mistakes are found before anything runs, at file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexactor.events.errors import ConfigError
from nexactor.learner.config import LearnerConfig, load_learner_config


def load(tmp_path: Path, text: str) -> LearnerConfig:
    path = tmp_path / "learner.yaml"
    path.write_text(text)
    return load_learner_config(path)


def test_a_file_becomes_a_configuration_with_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "policy: tiny\nout: o\noptimizer: {lr: 1e-3}\nbuckets: [64, 128]\n"
        "data: {labels: {split: train}, min_reward: 1, max_tokens: 128}\n",
    )
    assert config.optimizer.lr == 1e-3
    assert config.batch == 8
    assert config.data.min_reward == 1.0
    assert config.buckets == (64, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: p\nout: o\nbach: 3\n", r"learner\.yaml:3: bach: .*did you mean 'batch'"),
        ("policy: p\nout: o\noptimizer:\n  lrr: 3\n", r":4: optimizer\.lrr: .*did you mean 'lr'"),
        ("policy: p\nout: o\ndata:\n  min_rewards: 1\n", r":4: data\.min_rewards: .*'min_reward'"),
        ("policy: p\nout: o\nbatch: many\n", r":3: batch: "),
        ("policy: p\nout: o\nbatch: 0\n", r":3: batch: "),
        ("out: o\n", r"policy"),
        ("policy: p\nout: o\nname: a/b\n", r":3: name: "),
        ("policy: p\nout: o\nbuckets: [65]\n", r"multiples of 64"),
        ("policy: p\nout: o\nbuckets: [64]\n", r"max_tokens"),
        ("policy: p\nout: o\noptimizer: {decay: cosine}\n", r"decay_steps"),
        ("policy: [\n", r"this is not YAML"),
        ("- a\n", r"mapping of keys"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_learner_config(tmp_path / "nowhere.yaml")
