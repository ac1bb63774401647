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
_BY_T = ("error", "logvar")


class StepStatistics:
    """Means over the samples since the last `reset`, overall and by t; no host synchronisation."""

    def __init__(self, device: torch.device, extra: Sequence[str] = ()) -> None:
        """`extra`: figures of whole steps that an objective adds by `add_shares`."""
        self.device, self.extra = device, tuple(extra)
        self.reset()

    def reset(self) -> None:
        # steps, loss, samples, kept; then a sum over kept samples for each average, and for each bin of t; the extra.
        per_sample = 4 + len(_AVERAGED) + BINS * (1 + len(_BY_T))
        self._sums = torch.zeros(per_sample + len(self.extra), device=self.device)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Per-sample figures [B] as `tbcm_loss` returns them. Dropped samples count for `kept` only."""
        keep = figures["keep"]
        bins = (figures["t"] * (BINS / (math.pi / 2))).long().clamp(0, BINS - 1)
        one_hot = ((bins[:, None] == torch.arange(BINS, device=bins.device)) & keep[:, None]).float()
        values = {name: torch.where(keep, figures[name], 0.0) for name in _AVERAGED}
        zero, one = keep.new_zeros((), dtype=torch.float32), keep.new_ones(keep.shape, dtype=torch.float32)
        head = torch.stack([zero, zero, one.sum(), keep.sum(), *(v.sum() for v in values.values())])
        sums = torch.cat([head, one_hot.sum(0), *(values[name] @ one_hot for name in _BY_T)])
        self._sums[: len(sums)] += sums

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a step, this rank's share of it."""
        self._sums[0] += 1.0 / distributed.world_size()
        self._sums[1] += loss

    def add_shares(self, figures: Mapping[str, Tensor]) -> None:
        """This rank's shares, scalars, of the step's `extra` figures."""
        for name, share in figures.items():
            self._sums[self.extra.index(name) - len(self.extra)] += share

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
        self._sums = sums[: len(self._sums)]  # without what another objective added

    def summary(self) -> dict[str, Tensor]:
        """Means over all ranks' samples, as scalars on the device. `loss` is weighted as optimised, `error` is not:
        ||F - sg(F) - g||^2 / D. A bin of t without samples is NaN."""
        sums = distributed.all_reduce_sum(self._sums)
        extra = sums[len(sums) - len(self.extra) :]
        (steps, loss, samples, kept), rest = sums[:4], sums[4 : len(sums) - len(self.extra)]
        averaged, per_bin, by_t = rest.split([len(_AVERAGED), BINS, BINS * len(_BY_T)])
        out = {"loss": loss / steps, "kept": kept / samples}
        out |= dict(zip(_AVERAGED, averaged / kept, strict=True))
        for name, values in zip(_BY_T, by_t.view(-1, BINS) / per_bin, strict=True):
            out |= {f"{name}_by_t/{i}": value for i, value in enumerate(values)}
        return out | dict(zip(self.extra, extra / steps, strict=True))
