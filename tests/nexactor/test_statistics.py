"""Rates and their intervals, against published values."""

from __future__ import annotations

import pytest

from nexactor.statistics import rate


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (79, 100, 0.7002, 0.8583)],
)
def test_the_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    r = rate(successes, n)
    assert (r.low, r.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_nothing_tried_says_nothing() -> None:
    assert (rate(0, 0).low, rate(0, 0).high) == (0.0, 1.0)
