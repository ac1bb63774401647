"""The fused update of AdamW (csrc/adamw.cuh): after the norm, one pass over the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError
from tbcm.runtime.distributed import local
from tbcm.runtime.fused_update import FusedUpdate, Parts, Table, addresses_of, make_table
from tbcm.runtime.optimizer import gradient_norm


class FusedAdamW(FusedUpdate):
    """`FusedUpdate` for torch.optim.AdamW.

    A sharded weight (DTensor) is updated shard by shard, each rank its own: all but the norm is elementwise, and the
    norm is that of the whole. It agrees with the plain way to rounding: a step's change of a weight to 2e-5 of itself
    (bias corrections have more digits here) and a few roundings of the weight to fp32.
    """

    optimizers = torch.optim.AdamW

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["amsgrad"] or group["maximize"]:
            raise UserError("the fused step knows no amsgrad and no maximize: leave it out")

    def _parts(self, name: str, param: Tensor) -> Parts:
        state, shadow = self.optimizer.state[param], self.ema.shadow[name]
        alike = [local(part) for part in (param, state["exp_avg"], state["exp_avg_sq"], shadow)]
        return Parts([*alike], self._copy(name), [local(state["step"])])

    def _make_table(self, parts: list[Parts]) -> Table:
        sizes = [local(param).numel() for param in self.params]
        chunk = self.library.tbcm_fused_chunk()
        counts = [-(-size // chunk) for size in sizes]
        return make_table(parts, [[size] for size in sizes], counts, self.library.tbcm_adamw_step_bytes())

    def _norm(self) -> Tensor:
        return gradient_norm(self.params).to(self.device)

    def _update(self, factor: Tensor, ema_weight: Tensor, finite: Tensor) -> None:
        gradients, grad_type = self._gradients()
        table = self._current_table()
        rows, steps, gate = table.rows.data_ptr(), table.steps.data_ptr(), finite.data_ptr()
        with self._on_device():
            first = 0
            for group in self.optimizer.param_groups:
                count = len(group["params"])
                addresses = addresses_of(gradients[first : first + count])
                hyper = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
                self._call("adamw_begin", rows, steps, addresses, first, count, *hyper, gate, self._stream())
                first += count
            chunks = table.chunks.data_ptr(), len(table.chunks)
            types, scalars = (grad_type, self.copy_type), (factor.data_ptr(), ema_weight.data_ptr())
            self._call("adamw_update", rows, steps, *chunks, *types, *scalars, gate, self._stream())
