"""Means over seeds, and what they decide: Student's t without a library, and a verdict of three ways."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REPRODUCED, NOT_RESOLVED, REVERSED = "reproduced", "not resolved", "reversed"


@dataclass(frozen=True)
class Summary:
    """Of n values: their mean, their standard deviation (n - 1) and half the width of the mean's 95 % t-interval; both
    None for one value."""

    n: int
    mean: float
    deviation: float | None = None
    half: float | None = None

    @property
    def low(self) -> float:
        return self.mean - (math.inf if self.half is None else self.half)

    @property
    def high(self) -> float:
        return self.mean + (math.inf if self.half is None else self.half)


def summary(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        if not n:
            raise ValueError("no values to summarise")
        return Summary(n, mean)
    deviation = statistics.stdev(values)
    return Summary(n, mean, deviation, t_quantile(0.975, n - 1) * deviation / math.sqrt(n))


def paired(better: Mapping[int, float], worse: Mapping[int, float]) -> Summary | None:
    """Of the differences better - worse, seed by seed, over the seeds that both have; None if there are none."""
    seeds = sorted(better.keys() & worse.keys())
    return summary([better[seed] - worse[seed] for seed in seeds]) if seeds else None


def verdict(difference: Summary | None, *, lower_is_better: bool) -> str:
    """Of better - worse, as the paper orders the two: decided only if the 95 % interval leaves zero out."""
    if difference is None or difference.low <= 0 <= difference.high:
        return NOT_RESOLVED
    return REPRODUCED if (difference.mean < 0) == lower_is_better else REVERSED


def together(verdicts: Sequence[str]) -> str:
    """Of a whole order: reproduced if every pair is, reversed if any pair is."""
    if not verdicts:
        raise ValueError("an order without pairs")
    if REVERSED in verdicts:
        return REVERSED
    return REPRODUCED if all(each == REPRODUCED for each in verdicts) else NOT_RESOLVED


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with a whole number of degrees of freedom, for probabilities from 0.5 up."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of t at {probability} with {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom)), in which the distribution is a finite sum
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _within(middle, freedom) / 2 < probability else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < tan(angle) sqrt(freedom)) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sin, cos = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cos if odd else 1.0), 0.0
    for k in range(odd + 1, freedom, 2):
        total += term
        term *= cos * cos * k / (k + 1)
    return 2 / math.pi * (angle + sin * total) if odd else sin * total
