"""Means over seeds, and what they decide: t-intervals, and a verdict of three ways."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tbcm.errors import UserError

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
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        raise UserError("tables of several seeds need scipy: pip install tbcm[bench]") from None
    deviation = statistics.stdev(values)
    return Summary(n, mean, deviation, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))


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
