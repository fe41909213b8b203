"""How much the demo does in the minutes it is given."""

from __future__ import annotations

import msgspec


class DemoPlan(msgspec.Struct, frozen=True):
    """Counts of everything; `train_seconds` bounds the training phase whatever its steps."""

    held_out: int
    novel: int
    demonstrations: int
    runs_per_step: int
    publish_every: int
    validation: int
    parallel: int
    train_seconds: float
    learning_rate: float

    @property
    def max_steps(self) -> int:
        return self.demonstrations // self.runs_per_step


FULL_MINUTES = 25.0


def plan(minutes: float) -> DemoPlan:
    """The plan for a machine of 2 cores: in full at 25 minutes and above, in proportion below."""
    share = min(1.0, max(minutes, 1.0) / FULL_MINUTES)
    runs_per_step = 8 if share > 0.3 else 4
    demonstrations = max(6, round(18 * share)) * runs_per_step
    return DemoPlan(
        held_out=max(8, round(100 * share)),
        novel=max(4, round(20 * share)),
        demonstrations=demonstrations,
        runs_per_step=runs_per_step,
        publish_every=max(2, round(5 * share)),
        validation=max(4, round(10 * share)),
        parallel=16,
        train_seconds=60.0 * minutes * 0.6,
        learning_rate=2e-4,
    )
