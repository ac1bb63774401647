"""What training steps report: sums on the device, read together on log steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tbcm.runtime import distributed

BINS = 8
"""Of t, equal parts of [0, pi/2]."""
_AVERAGED = ("error", "g_norm", "logvar")
"""Of samples. There is room for all, whether or not a method reports them, so that one can go on from another."""
_BY_T = ("error", "logvar")


class StepStatistics:
    """Means over the samples since the last `reset`, overall and by t; no host synchronisation.

    The sums lie in one tensor, so that a collective exchanges them all: `_named` gives its parts their names.
    """

    def __init__(self, device: torch.device, of_samples: Sequence[str], extra: Sequence[str]) -> None:
        """Of a method: `of_samples` are the figures that it adds by `add`, `extra` those of whole steps that it adds by
        `add_shares`."""
        self.device, self.averaged, self.extra = device, tuple(of_samples), tuple(extra)
        alone = {"samples": 1, "kept": 1, **dict.fromkeys(_AVERAGED, 1)}
        by_t = {"kept_by_t": BINS, **{f"{name}_by_t": BINS for name in _BY_T}}
        self._sizes = {"steps": 1, "loss": 1, **alone, **by_t, **dict.fromkeys(self.extra, 1)}
        self._of_samples = slice(2, 2 + sum(alone.values()) + sum(by_t.values()))
        self.reset()

    def _named(self, sums: Tensor) -> dict[str, Tensor]:
        """Views of `sums`, scalars but for those by t [BINS]."""
        parts = dict(zip(self._sizes, sums.split(list(self._sizes.values())), strict=True))
        return {name: part if name.endswith("_by_t") else part[0] for name, part in parts.items()}

    def reset(self) -> None:
        self._sums = torch.zeros(sum(self._sizes.values()), device=self.device)

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Per-sample figures [B]: `t`, `keep` (dropped samples count for `kept` only) and those of the method."""
        keep, nothing = figures["keep"], figures["t"].new_zeros(())
        bins = (figures["t"] * (BINS / (math.pi / 2))).long().clamp(0, BINS - 1)
        one_hot = ((bins[:, None] == torch.arange(BINS, device=bins.device)) & keep[:, None]).float()
        values = {name: torch.where(keep, figures.get(name, nothing), 0.0) for name in _AVERAGED}
        one = keep.new_ones(keep.shape, dtype=torch.float32)
        head = torch.stack([one.sum(), keep.sum(), *(value.sum() for value in values.values())])
        self._sums[self._of_samples] += torch.cat([head, one_hot.sum(0), *(values[name] @ one_hot for name in _BY_T)])

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a step, this rank's share of it."""
        named = self._named(self._sums)
        named["steps"] += 1.0 / distributed.world_size()
        named["loss"] += loss

    def add_shares(self, figures: Mapping[str, Tensor]) -> None:
        """This rank's shares, scalars, of the step's `extra` figures."""
        if figures:
            named = self._named(self._sums)
            for name, share in figures.items():
                named[name] += share

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The sums of all ranks, whose means a resumed run goes on with; every rank calls it."""
        rows = self._sums.new_zeros(distributed.world_size(), len(self._sums))
        rows[distributed.rank()] = self._sums
        return {"ranks": distributed.all_reduce_sum(rows).tolist()}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Each rank's own sums, to the last bit; an equal share of them if the number of ranks is another."""
        rows = torch.tensor(state["ranks"], device=self.device)
        same = len(rows) == distributed.world_size()
        sums = rows[distributed.rank()] if same else rows.sum(0) / distributed.world_size()
        self._sums = sums[: len(self._sums)]  # without what another method added

    def summary(self) -> dict[str, Tensor]:
        """Means over all ranks' samples, as scalars on the device. `loss` is weighted as optimised, `error` is not (of
        a consistency loss ||F - sg(F) - g||^2 / D). A bin of t without samples is NaN."""
        sums = self._named(distributed.all_reduce_sum(self._sums))
        out = {"loss": sums["loss"] / sums["steps"], "kept": sums["kept"] / sums["samples"]}
        out |= {name: sums[name] / sums["kept"] for name in self.averaged}
        for name in (name for name in _BY_T if name in self.averaged):
            means = sums[f"{name}_by_t"] / sums["kept_by_t"]
            out |= {f"{name}_by_t/{i}": mean for i, mean in enumerate(means)}
        return out | {name: sums[name] / sums["steps"] for name in self.extra}
