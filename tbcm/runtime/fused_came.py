"""The fused update of CAME (csrc/came.cuh): four passes over the weights and what is summed between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError
from tbcm.runtime.came import CAME, is_matrix
from tbcm.runtime.fused_update import FusedUpdate, Parts, Table, addresses_of, make_table, same_order

_ALIGNED = 4  # numbers: 16 bytes


class FusedCAME(FusedUpdate):
    """`FusedUpdate` for `came.CAME`.

    The norm comes from the pass that sums squares by row and by column, so `clip` must see the gradients that `step` is
    to use. It agrees with the plain way to rounding, and sums more exactly (64 numbers in fp32, thousands in fp64).
    """

    optimizers = CAME
    _told: tuple[Table, list[Tensor | None], int]  # what `clip` has seen, for `step`

    def _check_group(self, group: dict[str, Any]) -> None:
        """It knows all that CAME does."""

    def _parts(self, name: str, param: Tensor) -> Parts:
        state = self.optimizer.state[param]
        keys = ("row", "col", "instability_row", "instability_col")
        alike = [param, state["momentum"], self.ema.shadow[name], state.get("square")]
        return Parts(alike, self._copy(name), [state.get(key) for key in keys])

    def _make_table(self, parts: list[Parts]) -> Table:
        shapes = [_shape(name, param) for name, param in zip(self.names, self.params, strict=True)]
        counts = [self.library.tbcm_came_tiles(*shape) for shape in shapes]
        sizes = [-(-self.library.tbcm_came_scratch(*shape) // _ALIGNED) * _ALIGNED for shape in shapes]
        sums = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
        totals = torch.empty(sum(counts), dtype=torch.float32, device=self.device)
        numbers, tile, at = [], 0, sums.data_ptr()
        for shape, count, size in zip(shapes, counts, sizes, strict=True):
            numbers.append([at, *shape, tile])
            tile, at = tile + count, at + size * sums.element_size()
        return make_table(parts, numbers, counts, self.library.tbcm_came_step_bytes(), sums, totals)

    def _norm(self) -> Tensor:
        gradients, grad_type = self._gradients()
        table = self._current_table()
        self._told = table, gradients, grad_type
        norm = torch.empty((), dtype=torch.float32, device=self.device)
        with self._on_device():
            given = addresses_of(gradients), grad_type, _totals(table), norm.data_ptr()
            self._call("came_norm", *_table_arguments(table), *given, self._stream())
        return norm

    def _update(self, factor: Tensor, ema_weight: Tensor, finite: Tensor) -> None:
        table, _, grad_type = self._told
        with self._on_device():
            first = 0
            for group in self.optimizer.param_groups:
                count = len(group["params"])
                hyper = group["lr"], *group["betas"], *group["eps"], group["clip_threshold"], group["weight_decay"]
                self._call("came_hyper", table.steps.data_ptr(), first, count, *hyper, self._stream())
                first += count
            scalars = factor.data_ptr(), ema_weight.data_ptr(), finite.data_ptr()
            types = grad_type, self.copy_type
            self._call("came_update", *_table_arguments(table), *types, _totals(table), *scalars, self._stream())
        del self._told


def _table_arguments(table: Table) -> tuple[int, int, int, int, int]:
    return table.rows.data_ptr(), table.steps.data_ptr(), len(table.rows), table.chunks.data_ptr(), len(table.chunks)


def _totals(table: Table) -> int:
    _, totals = table.scratch  # the other is of sums over rows and columns, and factors
    return totals.data_ptr()


def _shape(name: str, param: Tensor) -> tuple[int, int]:
    """(rows, columns) of a matrix, (0, numbers) of all else; so of what is empty, which has no rows to average."""
    if not is_matrix(param) or not param.numel():
        return 0, param.numel()
    if not same_order(param, torch.empty(param.shape, device="meta")):
        raise UserError(f"weight {name} is a matrix stored by columns: make it contiguous or set optimizer.fused=false")
    return param.shape[0], param.shape[1]
