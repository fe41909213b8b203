"""What a learner is told: one YAML file, checked so that a mistyped key is found before anything runs.

name: main
policy: smollm2-135m
out: .nexactor/learner
data: {labels: {split: train}, min_reward: 1.0}
batch: 8
optimizer: {lr: 1e-4, warmup: 5}
max_steps: 100
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from nexactor.events.errors import ConfigError
from nexactor.learner.rules import DataRules, OptimizerConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]


class LearnerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A learner's configuration.

    `policy`: the model to start from, a path or a name that `nexactor policy get` knows. `name`: the
    learner's stream is `learner/<name>`. `out`: the folder for checkpoints and published policies. `cursor`:
    where in the log to begin. `follow`: wait for new runs; without it, train on what the log holds now and
    end.

    `batch`: runs a step. `window` and `epochs`: so many batches are trained on `epochs` times, shuffled after
    the first, before the next are read (window 1: a batch is simply repeated). `seed` shuffles. `max_steps`:
    the end, 0 for none. `wait_for_reward`: train on a run only once it is scored. `max_open_runs` bounds
    memory (runs being assembled; the oldest is given up beyond it).

    `publish_every`, `checkpoint_every`: steps between. `keep`: newest checkpoints and policies that are kept.
    `buckets`: lengths of packs in tokens, multiples of 64 ([]: chosen from data.max_tokens). `remat`:
    recompute activations instead of keeping them, for memory.
    """

    policy: str
    out: str
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+$")] = "main"
    cursor: str = "start"
    follow: bool = True
    data: DataRules = DataRules()
    batch: Positive = 8
    window: Positive = 1
    epochs: Positive = 1
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    max_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    wait_for_reward: bool = True
    max_open_runs: Positive = 4096
    publish_every: Positive = 10
    checkpoint_every: Positive = 10
    keep: Annotated[int, msgspec.Meta(ge=2)] = 3
    buckets: tuple[Positive, ...] = ()
    remat: bool = False

    def __post_init__(self) -> None:
        if self.buckets and (
            any(b % 64 for b in self.buckets) or sorted(set(self.buckets)) != list(self.buckets)
        ):
            raise ValueError("buckets: lengths must ascend and be multiples of 64")
        if self.buckets and self.data.max_tokens > self.buckets[-1]:
            raise ValueError("buckets: the largest must hold data.max_tokens")


def load_learner_config(path: str | Path) -> LearnerConfig:
    """Read a learner's YAML file.

    Raises ConfigError that names file, line and key, and the nearest valid key for one that does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node, value = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the learner's file cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: this is not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a learner's file is a mapping of keys (policy, out, data, ...)")
    return learner_config(value, str(path), _lines(node))


def learner_config(value: dict[str, Any], source: str, lines: dict[str, int] | None = None) -> LearnerConfig:
    """A configuration from plain values; `source` and `lines` (line by dotted key) are for the error's text."""
    try:
        # YAML 1.1 reads 1e-4 as text: strict=False takes numbers written so.
        return msgspec.convert(value, LearnerConfig, strict=False)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        place = where.strip(".`")
        unknown = re.search(r"unknown field `([^`]*)`", message)
        if unknown:
            key = unknown.group(1)
            valid = {"data": DataRules, "optimizer": OptimizerConfig}.get(place, LearnerConfig)
            close = difflib.get_close_matches(key, valid.__struct_fields__, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid.__struct_fields__)}"
            place = f"{place}.{key}" if place else key
            message = f"there is no such key; {hint}"
        line = (lines or {}).get(place)
        at = f"{source}:{line}" if line else source
        raise ConfigError(f"{at}: {place + ': ' if place else ''}{message}") from error


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            name = f"{prefix}{key.value}"
            found[name] = key.start_mark.line + 1
            found |= _lines(child, f"{name}.")
    return found
