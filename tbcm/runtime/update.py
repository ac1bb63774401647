"""What follows the backward pass: clipping, optimiser and EMA, one after the other or fused.

In a step: norm, finite = update.clip(); then, all ranks agreed on `finite`, update.step(finite).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.runtime.ema import EMA
from tbcm.runtime.fused_adamw import FusedAdamW
from tbcm.runtime.fused_came import FusedCAME
from tbcm.runtime.fused_update import FusedUpdate
from tbcm.runtime.optimizer import clip_and_check, gated_step, parameters

logger = logging.getLogger(__name__)


class PlainUpdate:
    """Any optimiser that takes a flag (`optimizer.gated_step`), on any device.

    Args:
        max_norm: gradients are clipped to this global L2 norm (inf: not at all).
        copies: by name of a weight of `model`, a tensor that gets its value, rounded to the tensor's dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        max_norm: float,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.ema, self.max_norm = model, optimizer, ema, max_norm
        self.params = parameters(optimizer)
        weights = dict(model.named_parameters())
        self.copies = {weights[name]: copy for name, copy in (copies or {}).items()}

    def clip(self) -> tuple[Tensor, Tensor]:
        """Scales the gradients in place. Returns (norm before clipping, whether it is finite): fp32 and bool scalars
        on the device."""
        return clip_and_check(self.params, self.max_norm)

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Optimiser, EMA and copies; where `finite` (bool scalar on the device) is false, nothing changes a bit."""
        gated_step(self.optimizer, finite)
        self.ema.update(self.model, finite)
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))


Update = PlainUpdate | FusedUpdate


def build_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    max_norm: float,
    copies: Mapping[str, Tensor] | None = None,
    *,
    fused: Literal["auto"] | bool = "auto",
) -> Update:
    """The fused update where that is wanted ("auto": where it can be), else the plain one.

    Raises:
        UserError: `fused` is True and it cannot be.
    """
    if fused:
        try:
            return fused_class(optimizer)(model, optimizer, ema, max_norm, copies)
        except UserError as error:
            if fused is True:
                raise UserError(f"optimizer.fused=true: {error}; or set optimizer.fused=auto") from None
            if all(param.is_cuda for param in parameters(optimizer)):
                logger.info("the optimizer step is not fused: %s", error)
    return PlainUpdate(model, optimizer, ema, max_norm, copies)


def fused_class(optimizer: torch.optim.Optimizer) -> type[FusedUpdate]:
    """What fuses this optimiser's step.

    Raises:
        UserError: nothing does.
    """
    for fused in (FusedAdamW, FusedCAME):
        if isinstance(optimizer, fused.optimizers):
            return fused
    raise UserError(f"no step of {type(optimizer).__name__} is fused: set optimizer.name to adamw or came")
