"""Forward-mode differentiation of any function of tensors by PyTorch: the general way (see `dual` for the fast one)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tbcm_kernels.catalog import Dual
from torch import Tensor


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
