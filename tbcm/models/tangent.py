"""Forward-mode differentiation of a part of a network, in the same pass as its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dual = tuple[Tensor, Tensor | None]
"""A value and its tangent (None: the tangent is not wanted)."""


def push(fn: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Dual) -> tuple[Dual, ...]:
    """fn of the values, with its directional derivative along the tangents, in one pass (`torch.func.jvp`).

    The values keep their autograd graph, the tangents are detached here, part by part: a tangent that kept its graph
    until the end of the network would hold three times the memory. With a tangent of None nothing is differentiated.
    """
    values = tuple(value for value, _ in inputs)
    tangents = tuple(tangent for _, tangent in inputs)
    if any(tangent is None for tangent in tangents):
        out = fn(*values)
        return tuple((y, None) for y in (out if isinstance(out, tuple) else (out,)))
    out, d_out, *_ = torch.func.jvp(fn, values, tangents)
    if not isinstance(out, tuple):
        out, d_out = (out,), (d_out,)
    return tuple((y, dy.detach()) for y, dy in zip(out, d_out, strict=True))


def push_checkpointed(
    fn: Callable[..., Tensor], x: Dual, modulation: Dual, text: Tensor, weights: list[Tensor]
) -> Dual:
    """fn(x, modulation, text) and its derivative along x and modulation, keeping nothing but the inputs.

    Value and tangent come from one pass; backward runs the value alone once more, since tangents have no graph.
    (PyTorch's checkpoint would repeat both.) `weights`: the parameters that fn reads, whose gradients come out here.
    """
    y, dy = _Recompute.apply(fn, x[1], modulation[1], x[0], modulation[0], text, *weights)
    return y, dy


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: Callable[..., Tensor], dx: Tensor | None, dm: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x, modulation, text = tensors[:3]  # then the weights, which fn reads by itself
        ctx.fn, ctx.device = fn, x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(*tensors)
        ((y, dy),) = push(lambda x, modulation: fn(x, modulation, text), (x, dx), (modulation, dm))
        if dy is not None:
            ctx.mark_non_differentiable(dy)
        return y, dy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, modulation, text, *weights = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in (x, modulation, text)]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=enabled):
            y = ctx.fn(*inputs)
        return None, None, None, *torch.autograd.grad(y, [*inputs, *weights], grad, allow_unused=True)
