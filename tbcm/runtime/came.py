"""CAME: confidence-guided adaptive memory-efficient optimisation (Luo et al. 2023, arXiv 2307.02047, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError

# Parameters of one shape are updated together as one stacked tensor: a transformer has a few dozen shapes and hundreds
# of parameters, and one by one the launches of small kernels would take longer than the arithmetic. The bound keeps the
# temporaries small (about eight of 64 MiB).
_STACK_ELEMENTS = 2**24


class CAME(torch.optim.Optimizer):
    """Adafactor's factored second moment, with each update divided by a factored running estimate of its instability.

    With g the gradient of an n x m matrix, 1 the vector of ones:

        r  <- b2 r + (1 - b2) (g^2 + eps1) 1 / m          c <- b2 c + (1 - b2) 1' (g^2 + eps1) / n
        u   = g / sqrt(r c' / mean(r))                    u <- u / max(1, RMS(u) / d)
        mu <- b1 mu + (1 - b1) u
        R, C: like r, c with b3 and (u - mu)^2 + eps2     S = R C' / mean(R)
        theta <- theta (1 - lr weight_decay) - lr mu / sqrt(S)

    (Means in place of the paper's sums: the factors cancel in r c' / mean(r).) Weight decay is decoupled, as in AdamW.
    There is no bias correction.

    Matrices are the weights of linear layers and of 1 x 1 convolutions. All else, other convolutions too, keeps the
    full second moment, v <- b2 v + (1 - b2) (g^2 + eps1) and u = g / sqrt(v), and takes mu as its update. So it is in
    the optimiser that Sana was trained with (NVlabs/Sana, diffusion/utils/optimizer.py, `CAMEWrapper`): the paper has
    matrices only, and a depthwise weight factored as [out, 9] moves 35 times as far.

    Follows torch's protocol for gradient scalers (`found_inf`, `grad_scale`, see `optimizer.gated_step`): with
    found_inf = 1 parameters and state keep their bits, and the flag is never read on the host.

    Args:
        betas: decay of the update, of the squared gradient and of the instability.
        eps: added to the squared gradient and to the squared instability.
        clip_threshold: d, the largest root mean square of an update before momentum.

    Raises:
        UserError: a parameter is not fp32 (or fp64): averages with a decay of 0.9999 do not move in half precision. Or
            it is sharded, which is not supported: torch cannot update it in place where rows do not divide evenly.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                if param.dtype not in (torch.float32, torch.float64):
                    raise UserError(f"CAME needs float32 weights, not {param.dtype}: keep them in float32 (autocast)")
                if isinstance(param, DTensor):
                    raise UserError("CAME takes no sharded weights: set optimizer.name=adamw, or parallel.mode=ddp")
                self.state[param] = _zero_state(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _stacks([param for param in group["params"] if param.grad is not None and param.numel()]):
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of K parameters of one shape; [K, n, m] for matrices, [K, numbers] for all else."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        finite = torch.ones((), dtype=torch.bool, device=params[0].device) if found_inf is None else found_inf == 0

        def average(key: str, value: Tensor, beta: float) -> Tensor:
            """The state's exponential moving average with `value` in it, stored and returned."""
            states = [self.state[param][key] for param in params]
            old = torch.stack(states)
            target = torch.where(finite, value.reshape(old.shape), old)  # a step towards itself keeps every bit
            torch._foreach_lerp_(states, list(target.unbind()), 1 - beta)
            return torch.stack(states).reshape(value.shape)

        grad = torch.stack([param.grad for param in params if param.grad is not None])
        matrices = is_matrix(params[0])
        grad = grad.reshape(*grad.shape[:3]) if matrices else grad.reshape(len(params), -1)
        if grad_scale is not None:
            grad = grad / grad_scale
        square = grad.square() + eps1
        if matrices:
            row, col = average("row", square.mean(2), beta2), average("col", square.mean(1), beta2)
            update = grad * _factored_rsqrt(row, col)
        else:
            update = grad * average("square", square, beta2).rsqrt()
        rms = update.square().mean(tuple(range(1, grad.dim())), keepdim=True).sqrt()
        update = update / (rms / group["clip_threshold"]).clamp(min=1)
        momentum = average("momentum", update, beta1)
        if matrices:
            instability = (update - momentum).square() + eps2
            row = average("instability_row", instability.mean(2), beta3)
            col = average("instability_col", instability.mean(1), beta3)
            momentum = momentum * _factored_rsqrt(row, col)

        # A multiplication by 1 and a subtraction of 0 keep every bit, so a skipped step needs no copy of the weights.
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - finite.to(grad.dtype) * (group["lr"] * group["weight_decay"]))
        change = torch.where(finite, group["lr"] * momentum, 0.0).reshape(len(params), *params[0].shape)
        torch._foreach_sub_(params, list(change.unbind()))


def is_matrix(param: Tensor) -> bool:
    """[n, m], or the [n, m, 1, 1] of a 1 x 1 convolution."""
    return param.dim() == 2 or (param.dim() == 4 and param.shape[2:].numel() == 1)


def _zero_state(param: Tensor) -> dict[str, Tensor]:
    """Made at once, not on the first step, so that a checkpoint finds the tensors it restores."""
    state = {"momentum": torch.zeros_like(param)}
    if not is_matrix(param):
        return state | {"square": torch.zeros_like(param)}
    rows, cols = param.shape[:2]
    for prefix in ("", "instability_"):
        state[f"{prefix}row"], state[f"{prefix}col"] = param.new_zeros(rows), param.new_zeros(cols)
    return state


def _stacks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of parameters of one shape, dtype and device, of a bounded number of elements each."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for param in params:
        alike.setdefault((param.shape, param.dtype, param.device), []).append(param)
    for group in alike.values():
        count = max(1, _STACK_ELEMENTS // max(1, group[0].numel()))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _factored_rsqrt(row: Tensor, col: Tensor) -> Tensor:
    """1 / sqrt(row col' / mean(row)): row [K, n], col [K, m] -> [K, n, m].

    Factor by factor: row * col underflows in fp32 where a gradient is zero (1e-33 * 1e-33).
    """
    return (row / row.mean(1, keepdim=True)).rsqrt()[:, :, None] * col.rsqrt()[:, None, :]
