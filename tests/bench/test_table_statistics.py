from __future__ import annotations

import math

import pytest
from paper import published
from paper.statistics import (
    NOT_RESOLVED,
    REPRODUCED,
    REVERSED,
    Summary,
    paired,
    summary,
    together,
    verdict,
)


def test_interval_of_two_values_in_closed_form() -> None:
    # Their standard deviation is |a - b| / sqrt(2), so that the half width is tan(0.475 pi) |a - b| / 2.
    of = summary([3.0, 5.0])
    assert (of.n, of.mean, of.deviation) == (2, 4.0, pytest.approx(math.sqrt(2)))
    assert of.half == pytest.approx(math.tan(0.475 * math.pi))
    assert summary([7.0]) == Summary(1, 7.0) and summary([7.0]).low == -math.inf


def test_verdicts_go_by_pairs() -> None:
    # The spread over seeds is ten times the difference, and the same in both arms.
    worse = {0: 10.0, 1: 20.0, 2: 30.0}
    better = {seed: value - 1 - 0.01 * seed for seed, value in worse.items()}
    assert verdict(paired(better, worse), lower_is_better=True) == REPRODUCED
    assert verdict(paired(better, worse), lower_is_better=False) == REVERSED
    assert verdict(paired(worse, better), lower_is_better=True) == REVERSED
    shuffled = {0: better[1], 1: better[0], 2: better[2]}
    assert verdict(paired(shuffled, worse), lower_is_better=True) == NOT_RESOLVED
    # Only seeds that both have; one pair decides nothing.
    assert paired({0: 1.0, 1: 2.0}, {1: 5.0, 2: 7.0}) == Summary(1, -3.0)
    assert verdict(paired({0: 1.0}, {0: 100.0}), lower_is_better=True) == NOT_RESOLVED
    assert paired({0: 1.0}, {1: 2.0}) is None and verdict(None, lower_is_better=True) == NOT_RESOLVED


def test_an_order_is_reproduced_if_all_of_it_is() -> None:
    assert together([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert together([REPRODUCED, NOT_RESOLVED]) == NOT_RESOLVED
    assert together([REPRODUCED, REVERSED, NOT_RESOLVED]) == REVERSED
    assert published.order("a", "b", "c") == (("a", "b"), ("b", "c"), ("a", "c"))
    assert published.order("a", "b") == (("a", "b"),)


def test_the_papers_orders_are_those_of_its_values() -> None:
    for table in (table for tables in published.TABLES.values() for table in tables):
        for pairs, sign, name in ((table.by_fid, 1, "fid"), (table.by_clip, -1, "clip")):
            for pair in pairs:
                better, worse = (getattr(table.line(label), name) for label in pair)
                assert table.number == 6 or sign * better < sign * worse
