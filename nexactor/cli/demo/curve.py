"""The demo's learning curve, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexactor.statistics import Rate


def draw_curve(
    path: Path,
    *,
    steps: list[dict[str, float]],
    validation: list[tuple[int, Rate]],
    before: Rate,
    after: Rate,
    title: str,
) -> None:
    """Loss over gradient steps; success on validation tasks by the weights that played; held-out before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(1, 1.3))
    last = max([1, *(int(s["step"]) for s in steps)])
    top.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="#2563eb", linewidth=1.5)
    top.set_ylabel("loss (nats a token)")
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    if validation:
        xs = [step for step, _ in validation]
        ys = [100 * r.rate for _, r in validation]
        bottom.errorbar(
            xs,
            ys,
            yerr=_errors([r for _, r in validation]),
            fmt="o-",
            ms=4,
            color="#6b7280",
            capsize=2,
            linewidth=1,
            label="validation tasks, while training",
        )
    ends: Any = [(0, before, "#dc2626", "before"), (last, after, "#16a34a", "after")]
    for x, r, colour, name in ends:
        bottom.errorbar(
            [x],
            [100 * r.rate],
            yerr=_errors([r]),
            fmt="D",
            ms=7,
            color=colour,
            capsize=4,
            label=f"held-out {name}: {100 * r.rate:.0f} % of {r.n}",
        )
    bottom.set_xlabel("gradient step of the weights that played")
    bottom.set_ylabel("tasks solved (%)")
    bottom.set_ylim(-3, 103)
    bottom.grid(alpha=0.3)
    bottom.legend(loc="best", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _errors(rates: list[Rate]) -> list[list[float]]:
    # A bound of 0 or 1 may miss the rate by a rounding error, which is no negative length.
    return [[100 * max(0.0, r.rate - r.low) for r in rates], [100 * max(0.0, r.high - r.rate) for r in rates]]
