"""Exponential moving averages of the weights, kept in fp32 on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.runtime.distributed import local

_LARGEST_SIGMA_REL = 0.28  # gamma = 0 is at 0.2887; beyond, the profile grows towards the oldest weights


class EMA:
    """A shadow of a model's trainable floating-point parameters (buffers and frozen weights stay the model's own).

    After the t-th successful update, shadow <- shadow + w_t (theta_t - shadow):

    * "power": 1 - w_t = (1 - 1/t)^(gamma + 1), the power-function profile of Karras et al. 2024 (arXiv 2312.02696,
      Sec. 3.1); its width grows with training. `sigma_rel` is the profile's standard deviation over its length.
    * "halflife": 1 - w_t = 0.5^(1 / h_t), h_t = min(halflife, ramp_up * t), in updates.
      With ramp_up None, h_t = halflife.

    An update that the optimiser skipped changes neither the shadow nor t: both are on the device, where the host never
    looks at them.

    Args:
        sigma_rel: in (0, 0.28]; 0.05 gives gamma = 16.97, 0.10 gives 6.94.

    Raises:
        UserError: unknown kind, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "power",
        *,
        sigma_rel: float = 0.05,
        halflife: float = 1000.0,
        ramp_up: float | None = 0.05,
    ) -> None:
        if kind not in ("power", "halflife"):
            raise UserError(f"unknown EMA kind {kind!r}: choose power or halflife")
        if kind == "halflife" and (halflife <= 0 or (ramp_up is not None and ramp_up <= 0)):
            raise UserError(f"EMA halflife {halflife} and ramp_up {ramp_up} must be above 0 (ramp_up may be null)")
        self.gamma = power_function_gamma(sigma_rel) if kind == "power" else None
        self.halflife, self.ramp_up = halflife, ramp_up
        self.shadow = {name: param.detach().to(torch.float32, copy=True) for name, param in _trainable(model).items()}
        device = next(iter(self.shadow.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, model: nn.Module, finite: Tensor) -> None:
        """Takes in the model's weights. `finite`: bool scalar on the device, false where the step was skipped."""
        weight = self.advance(finite)
        params = _trainable(model)
        end = [local(params[name].detach()).float() for name in self.shadow]
        torch._foreach_lerp_(list(map(local, self.shadow.values())), end, [weight] * len(end))

    def advance(self, finite: Tensor) -> Tensor:
        """Counts an update, for who moves the shadow (`update`; `fused_update`). Returns w_t, 0 where it was skipped:
        fp32 scalar on the device."""
        self.updates += finite
        # torch.where, not a product: at t = 0 the weight is undefined, and a skipped update must not see it.
        return torch.where(finite, self._weight(self.updates.float()), 0.0)

    def _weight(self, t: Tensor) -> Tensor:
        """w_t as an fp32 scalar; through expm1 and log1p, since 1 - (1 - 1/t)^k loses its digits in fp32."""
        if self.gamma is not None:
            return -torch.expm1((self.gamma + 1) * torch.log1p(-1 / t))
        halflife = torch.full_like(t, self.halflife)
        if self.ramp_up is not None:
            halflife = torch.minimum(halflife, self.ramp_up * t)
        return -torch.expm1(-math.log(2) / halflife)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Gives `model` the averaged weights, rounded to its dtype."""
        params = _trainable(model)
        weights = [local(params[name]) for name in self.shadow]
        torch._foreach_copy_(weights, list(map(local, self.shadow.values())))

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights (rounded to its dtype); afterwards its own, bit for bit."""
        params = _trainable(model)
        targets = [local(params[name].detach()) for name in self.shadow]
        own = [target.clone() for target in targets]
        self.copy_to(model)
        try:
            yield
        finally:
            torch._foreach_copy_(targets, own)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if different := sorted(state["shadow"].keys() ^ self.shadow.keys()):
            raise UserError(f"the EMA and the model differ in {len(different)} weights, the first is {different[0]}")
        self.updates.copy_(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


def power_function_gamma(sigma_rel: float) -> float:
    """gamma with sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the largest root of a cubic."""
    if not 0 < sigma_rel <= _LARGEST_SIGMA_REL:
        raise UserError(f"EMA sigma_rel is {sigma_rel}: it must be above 0 and at most {_LARGEST_SIGMA_REL}")
    a = sigma_rel**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
