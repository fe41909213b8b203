"""Rates with their uncertainty."""

from __future__ import annotations

import math

import msgspec


class Rate(msgspec.Struct, frozen=True):
    """`successes` of `n`, with the bounds of its 95 % Wilson interval (Wilson 1927, eq. without continuity)."""

    successes: int
    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.1%} ({self.successes}/{self.n}, 95 % interval {self.low:.1%} to {self.high:.1%})"


def rate(successes: int, n: int, z: float = 1.959964) -> Rate:
    """The rate and its Wilson score interval; (0, 1) where nothing was tried."""
    if n == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Rate(successes, n, p, max(0.0, centre - half), min(1.0, centre + half))
