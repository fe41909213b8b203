"""The parts of a learner's configuration that say what is trained on and how; no JAX, no numpy."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class DataRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which trajectories are trained on. Runs that failed for infrastructure reasons never are.

    `labels` must all match the run's. `statuses` (empty: any) and `min_reward` are what the run must have
    reached. A sample of more than `max_tokens` is dropped, or with `too_long: cut` cut at its end.
    `incomplete: drop` leaves out runs of which an agent has no end or a call cannot be rebuilt from the log.
    """

    labels: dict[str, str] = {}
    statuses: tuple[str, ...] = ()
    min_reward: float | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=2)] = 2048
    too_long: Literal["drop", "cut"] = "drop"
    incomplete: Literal["drop", "keep"] = "keep"


class OptimizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW with a linear warm-up to `lr` over `warmup` steps, then constant or falling to 0 at
    `decay_steps`.

    `clip` bounds the global norm of the gradient; 0 leaves it alone. Weight decay spares norms and biases.
    """

    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-4
    warmup: Annotated[int, msgspec.Meta(ge=0)] = 5
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    clip: Annotated[float, msgspec.Meta(ge=0)] = 1.0

    def __post_init__(self) -> None:
        if self.decay != "constant" and self.decay_steps <= self.warmup:
            raise ValueError(f"optimizer.decay_steps must be above warmup for decay: {self.decay}")
