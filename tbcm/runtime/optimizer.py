"""Optimisers whose step can be called off by a flag on the device, and the gradient clipping that sets the flag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tbcm.errors import UserError
from tbcm.runtime.came import CAME


def build_optimizer(
    name: str,
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: Sequence[float] | None = None,
    weight_decay: float = 0.0,
    eps: float | Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser by name, its state made at once so that a checkpoint can restore it in place.

    Args:
        name: "adamw" (torch's, fused) or "came" (`came.CAME`).
        params: parameters, or torch's parameter groups.
        betas: 2 numbers for adamw (default 0.9, 0.999), 3 for came (default 0.9, 0.999, 0.9999).
        eps: 1 number for adamw (default 1e-8), 2 for came (default 1e-30, 1e-16).

    Raises:
        UserError: unknown name, or betas or eps of the wrong length.
    """
    if name == "adamw":
        beta1, beta2 = _numbers("betas", name, betas, (0.9, 0.999))
        (epsilon,) = _numbers("eps", name, eps, (1e-8,))
        # The fused step is the one that takes a device flag (found_inf); it exists for the CPU too.
        adamw = torch.optim.AdamW(
            params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay, fused=True
        )
        _make_adamw_state(adamw)
        return adamw
    if name == "came":
        beta1, beta2, beta3 = _numbers("betas", name, betas, (0.9, 0.999, 0.9999))
        eps1, eps2 = _numbers("eps", name, eps, (1e-30, 1e-16))
        return CAME(params, lr, betas=(beta1, beta2, beta3), eps=(eps1, eps2), weight_decay=weight_decay)
    raise UserError(f"unknown optimizer {name!r}: choose adamw or came")


def clip_and_check(params: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales the gradients in place to a global L2 norm of at most `max_norm` (inf: no clipping).

    Returns (norm before clipping, whether it is finite): fp32 and bool scalars on the device, never read on the host.
    """
    params = list(params)
    norm = gradient_norm(params)
    clip_grads_with_norm_(params, max_norm, norm)
    return norm, norm.isfinite()


def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """The global L2 norm of the gradients (of the whole ones, where they are sharded): fp32 scalar on the device."""
    norm = get_total_norm([param.grad for param in params if param.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def gated_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` where `finite` (bool scalar on the device) is true; else parameters and state keep their bits.

    The step counter counts as state. Uses torch's protocol for gradient scalers, without a host sync.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} does not honour found_inf (torch's own: fused=True does)")
    gated: Any = optimizer
    gated.found_inf = (~finite).float()
    try:
        gated.step()
    finally:
        del gated.found_inf


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _numbers(
    what: str, name: str, given: float | Sequence[float] | None, default: tuple[float, ...]
) -> tuple[float, ...]:
    if given is None:
        return default
    numbers = tuple(map(float, given if isinstance(given, Sequence) else (given,)))
    if len(numbers) != len(default):
        raise UserError(f"optimizer {name} takes {len(default)} {what} (default {default}), not {len(numbers)}")
    return numbers


def _make_adamw_state(optimizer: torch.optim.AdamW) -> None:
    """What torch makes on the first step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
