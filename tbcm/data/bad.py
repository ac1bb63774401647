"""Samples that cannot be used: skipped, counted, told once by kind; too many of them end the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.errors import UserError

logger = logging.getLogger(__name__)

ENOUGH = 1000
"""Samples from which a share can be judged, where a data set has as many."""


class SampleError(UserError):
    """A sample that cannot be used. `kind` is what its likes are counted under; `index` which of the data set it is."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.index: int | None = None


class Bad:
    """The bad samples of the data set `name`, of which at most `max_share` may be bad."""

    def __init__(self, name: str, max_share: float) -> None:
        self.name, self.max_share = name, max_share
        self.kinds: Counter[str] = Counter()
        self._first: dict[str, SampleError] = {}

    @property
    def count(self) -> int:
        return self.kinds.total()

    def add(self, error: SampleError) -> None:
        """Raises `error` where none may be bad."""
        if self.max_share == 0:
            raise error
        self.kinds[error.kind] += 1
        self._first.setdefault(error.kind, error)

    def check(self, among: int) -> None:
        """Raises UserError where too many of `among` samples were bad."""
        if self.count > self.max_share * among:
            raise UserError(
                f"{self.name}: {self.count:,} of {among:,} samples are bad, more than data.max_bad_share ="
                f" {self.max_share:g} allows: {self}"
            )

    def report(self, among: int) -> None:
        """Logs what was skipped, if any, once all of `among` samples were looked at."""
        self.check(among)
        if self.count:
            logger.warning(
                "%s: %s of %s samples are bad and skipped: %s", self.name, f"{self.count:,}", f"{among:,}", self
            )

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {count:,} (such as {self._first[kind]})" for kind, count in self.kinds.most_common())


class Images(Protocol):
    """As `tbcm.data.images.CaptionedImages`."""

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int], size: Size) -> Tensor: ...


class GoodImages:
    """Images of which one that cannot be decoded gives its place to the next that can.

    Which takes whose place is a function of the files alone: the same on any number of ranks and after an interruption.
    A rank stops when more than `max_share` of the images that it has tried are bad (of `ENOUGH` at least).
    """

    def __init__(self, images: Images, max_share: float) -> None:
        self._images = images
        self._bad = Bad(str(getattr(images, "name", "the images")), max_share)
        self.places: set[int] = set()  # of the bad images that were met
        self._tried = 0

    def __call__(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        """Images of `size` [B, 3, H, W] float32 in [-1, 1], and which they are: `indices` where those are good.

        Raises UserError where too many are bad.
        """
        self._tried = min(self._tried + len(indices), len(self._images))  # an epoch shows each once
        while True:
            taken = [next_good(index, self.places, len(self._images)) for index in indices]
            try:
                return self._images.images(taken, size), taken
            except SampleError as error:
                if error.index is None:
                    raise
                self._note(error, error.index)

    def _note(self, error: SampleError, index: int) -> None:
        self._bad.add(error)
        self.places.add(index)
        self._bad.check(max(self._tried, min(len(self._images), ENOUGH)))
        if (count := self._bad.kinds[error.kind]) in (1, 10, 100, 1_000, 10_000):
            logger.warning("%s; skipped, the next takes its place (%s: %s so far)", error, error.kind, f"{count:,}")


def next_good(index: int, bad: set[int], count: int) -> int:
    """The first of index, index + 1, ... (around to 0) that is not bad. At least one must be good."""
    while index in bad:
        index = (index + 1) % count
    return index
