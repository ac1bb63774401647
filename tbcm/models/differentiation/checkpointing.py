"""Activation checkpointing of dual numbers: backward recomputes values alone, since tangents have no graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from tbcm_kernels.catalog import Dual
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten

Part = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, Tensor], Dual]
"""(x, dx, modulation, dmodulation, text) -> (y, dy): dy without a graph, y the same with and without tangents."""


def full_checkpoint(part: Part, x: Dual, modulation: Dual, text: Tensor, weights: list[Tensor]) -> Dual:
    """`part`, of which nothing but the inputs is kept: backward runs it once more, without tangents.

    `weights`: the parameters that it reads, whose gradients come out here. (PyTorch's checkpoint would repeat the
    tangents.)
    """
    y, dy = _Recompute.apply(part, x[1], modulation[1], x[0], modulation[0], text, *weights)
    return y, dy


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: Part, dx: Tensor | None, dm: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x, modulation, text = tensors[:3]  # then the weights, which the part reads by itself
        ctx.part, ctx.device = part, x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(*tensors)
        y, dy = part(x, dx, modulation, dm, text)
        if dy is not None:
            ctx.mark_non_differentiable(dy)
        return y, dy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, modulation, text, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:6]  # a frozen network's text and modulation have no use for theirs
        inputs = [t.detach().requires_grad_(n) for t, n in zip((x, modulation, text), needed, strict=True)]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=enabled):
            y, _ = ctx.part(inputs[0], None, inputs[1], None, inputs[2])
        wanted = [tensor for tensor in (*inputs, *weights) if tensor.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, None, *(next(found) if t.requires_grad else None for t in (*inputs, *weights))


def selective_checkpoint(part: Part, x: Dual, modulation: Dual, text: Tensor) -> Dual:
    """`part`, of which the results of its linear layers are kept and all else is recomputed: norms, activations,
    depthwise convolutions and attention, which hold most of the memory and little of the arithmetic."""
    tangents = x[1], modulation[1]

    def run(x: Tensor, modulation: Tensor, text: Tensor) -> Dual:
        nonlocal tangents
        dx, dm = tangents
        tangents = None, None  # the second run is backward's
        return part(x, dx, modulation, dm, text)

    y, dy = checkpoint(
        run,
        x[0],
        modulation[0],
        text,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_and_reuse,
    )
    return y, dy


_LINEAR = aten.mm.default, aten.addmm.default


class _Keep(TorchDispatchMode):
    """Keeps the results of linear layers, in the order of their calls."""

    def __init__(self, kept: deque[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if operator in _LINEAR and torch.is_grad_enabled():  # without gradients it is a tangent's
            self.kept.append(out)
        return out


class _Reuse(_Keep):
    """Answers with them. (PyTorch's own selective contexts count all calls, and the tangents' would put them off.)"""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator not in _LINEAR:
            return operator(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError("selective checkpointing allows one backward pass: what it kept is used up")
        return self.kept.popleft()


def _keep_and_reuse() -> tuple[_Keep, _Reuse]:
    kept: deque[Tensor] = deque()
    return _Keep(kept), _Reuse(kept)
