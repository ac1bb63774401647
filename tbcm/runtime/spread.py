"""The spread of a repeated measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Of repeats: the median, the 20 % and the 80 % quantile, in the unit of the values."""

    median: float
    p20: float
    p80: float

    def named(self, name: str) -> dict[str, float]:
        """NAME, NAME_p20 and NAME_p80."""
        return {name: self.median, f"{name}_p20": self.p20, f"{name}_p80": self.p80}


def spread(values: Sequence[float]) -> Spread:
    """Of two values or more; quantiles between them are interpolated, none is beyond them."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), low, high)
