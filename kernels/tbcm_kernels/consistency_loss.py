"""The masked, adaptively weighted consistency loss, and its gradient to the prediction and the log-variance.

    loss = sum over the batch of keep (w(t) e^{-logvar} e + logvar) / count,    e = ||F - sg(F) - g||^2 / D
    dloss/dF = -2 keep w(t) e^{-logvar} g / (D count),    dloss/dlogvar = keep (1 - w(t) e^{-logvar} e) / count

with w(t) = max(cos t, 0) / (sigma_d sin t) and D = C H W. F - sg(F) is zero in value, so that g alone is read: once
forward, and once backward, where dF is written. Forward is a kernel for the sums of squares by chunks, and a small one,
of a single program, for all that follows; sums are always added in the same order. What a dropped sample holds is not
used, even NaN.

Saved for backward: g, logvar, t, keep and e.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.catalog import Cost, Operator, Size, nbytes
from tbcm_kernels.dispatch import fused
from tbcm_kernels.launch import jit, launch, operator, tl, triton, wide
from tbcm_kernels.tangent import chunk


def time_weight(t: Tensor, sigma_data: float) -> Tensor:
    """w(t) = 1 / (sigma_d tan t), the prior weighting of sCM. In fp32 pi/2 rounds up: 0 there, not a little below."""
    return torch.cos(t).clamp(min=0.0) / (sigma_data * torch.sin(t))


def reference(
    F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """`consistency_loss` in plain PyTorch."""
    residual = torch.where(keep[:, None, None, None], F - F.detach() - g, 0.0)
    error = residual.square().mean(dim=(1, 2, 3))
    logvar = torch.where(keep, logvar, 0.0)
    loss = (time_weight(t, sigma_data) * torch.exp(-logvar) * error + logvar).sum() / count
    return loss, error.detach()


@jit
def _squares_kernel(g, keep, sums, size, BLOCK: tl.constexpr):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    used = tl.where(tl.load(keep + sample) != 0, size, 0)
    within = part * BLOCK + tl.arange(0, BLOCK)
    residual = tl.load(g + sample * size + within, mask=within < used, other=0.0)
    tl.store(sums + sample * tl.num_programs(1) + part, tl.sum(residual * residual, axis=0))


@jit
def _scale(t, logvar, sigma_data):
    """w(t) e^{-logvar}."""
    return tl.maximum(tl.cos(t), 0.0) / (sigma_data * tl.sin(t)) * tl.exp(-logvar)


@jit
def _loss_kernel(
    sums, logvar, t, keep, loss, error, count, sigma_data, batch, size, parts,
    WIDE: tl.constexpr, SAMPLES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    count, sigma_data = tl.full((), count, WIDE), tl.full((), sigma_data, WIDE)
    total = tl.zeros([SAMPLES], WIDE)
    each = tl.arange(0, PARTS)[None, :]
    for first in range(0, batch, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        inside = sample < batch
        kept = inside & (tl.load(keep + sample, mask=inside, other=0) != 0)
        squares = tl.load(sums + sample[:, None] * parts + each, mask=inside[:, None] & (each < parts), other=0.0)
        mean = tl.sum(squares, axis=1) / size
        tl.store(error + sample, mean, mask=inside)
        log = tl.load(logvar + sample, mask=kept, other=0.0).to(WIDE)
        term = _scale(tl.load(t + sample, mask=kept, other=1.0), log, sigma_data) * mean + log
        total += tl.where(kept, term, 0.0)
    tl.store(loss, tl.sum(total, axis=0) / count)


@jit
def _gradient_kernel(
    dloss, g, logvar, t, keep, error, dF, dlogvar, count, sigma_data, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count, sigma_data = tl.full((), count, WIDE), tl.full((), sigma_data, WIDE)
    kept = tl.load(keep + sample) != 0
    scale = _scale(tl.load(t + sample), tl.load(logvar + sample).to(WIDE), sigma_data)
    share = tl.load(dloss) / count
    if part == 0:
        tl.store(dlogvar + sample, tl.where(kept, share * (1.0 - scale * tl.load(error + sample)), 0.0))
    within = part * BLOCK + tl.arange(0, BLOCK)
    at = sample * size + within
    residual = -tl.load(g + at, mask=within < tl.where(kept, size, 0), other=0.0)
    factor = tl.where(kept, share * scale / size, 0.0)
    tl.store(dF + at, factor * (2.0 * residual), mask=within < size)


@operator("tbcm::consistency_loss")
def _consistency_loss(
    F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float
) -> tuple[Tensor, Tensor]:
    g, logvar, t, keep = (tensor.contiguous() for tensor in (g, logvar, t, keep))
    batch, size = g.shape[0], math.prod(g.shape[1:])
    block = chunk(size)
    grid = batch, triton.cdiv(size, block)
    loss, error, sums = t.new_empty(()), t.new_empty(t.shape), t.new_empty(grid)
    launch(_squares_kernel, grid, g, keep, sums, size, BLOCK=block, num_warps=block // 256)
    parts = triton.next_power_of_2(grid[1])
    shape = {"WIDE": wide(g.dtype), "SAMPLES": min(128, max(1, 4096 // parts)), "PARTS": parts}
    tensors, numbers = (sums, logvar, t, keep, loss, error), (float(count), sigma_data, batch, size, grid[1])
    launch(_loss_kernel, (1,), *tensors, *numbers, **shape, num_warps=4)
    return loss, error


@operator("tbcm::consistency_loss_backward")
def _gradient(
    dloss: Tensor,
    g: Tensor,
    logvar: Tensor,
    t: Tensor,
    keep: Tensor,
    error: Tensor,
    count: int,
    sigma_data: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    g, logvar, t, keep = (tensor.contiguous() for tensor in (g, logvar, t, keep))
    dF, dlogvar = g.new_empty(g.shape, dtype=dtype), logvar.new_empty(logvar.shape)
    size = math.prod(g.shape[1:])
    block = chunk(size)
    tensors = dloss, g, logvar, t, keep, error, dF, dlogvar
    launch(
        *(_gradient_kernel, (g.shape[0], triton.cdiv(size, block)), *tensors, float(count), sigma_data, size),
        **{"WIDE": wide(g.dtype), "BLOCK": block, "num_warps": block // 256},
    )
    return dF, dlogvar


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    F, g, logvar, t, keep, ctx.count, ctx.sigma_data = inputs
    _, error = output
    ctx.dtype = F.dtype
    ctx.mark_non_differentiable(error)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(g, logvar, t, keep, error)


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 7
    dF, dlogvar = _gradient(dloss, *ctx.saved_tensors, ctx.count, ctx.sigma_data, ctx.dtype)
    return dF, None, dlogvar, None, None, None, None


_consistency_loss.register_autograd(_backward, setup_context=_save)


def consistency_loss(
    F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """The loss, and each sample's unweighted error e [B], 0 where it is dropped and without a graph.

    `F` and the tangent `g` [B, C, H, W], which has no graph; `logvar`, `t` in radians and `keep` (bool) [B]. `count` is
    the number of samples of the whole step, dropped ones included. g and t are fp32, as loss and error; F and logvar,
    which have gradients, of any dtype.
    """
    exact = {g.dtype, t.dtype} in ({torch.float32}, {torch.float64})
    unsupported = None if exact else "g or t other than fp32"
    if fused("consistency_loss", F, g, logvar, t, unsupported=unsupported):
        return _consistency_loss(F, g, logvar, t, keep, count, sigma_data)
    return reference(F, g, logvar, t, keep, count, sigma_data)


def cost(F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float) -> Cost:
    """A multiply-add an element of g, which alone is read; [B] tensors are read, and the error is written."""
    return Cost(2 * g.numel(), nbytes(g, logvar, t, keep, t))


def backward_cost(F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float) -> Cost:
    """A product an element; g is read again and F's gradient is written."""
    return Cost(g.numel(), nbytes(g, F, logvar, t, keep, t, logvar))


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """Of a student's samples: fp32 whatever its activations are, tangents of norm about 1, a quarter dropped."""
    exact = torch.promote_types(dtype, torch.float32)
    shape = size.samples, size.channels, size.rows, size.columns
    F, g = (torch.randn(shape, dtype=exact, device=device) for _ in range(2))
    g /= math.prod(shape[1:]) ** 0.5
    logvar = torch.randn(size.samples, dtype=exact, device=device)
    t = torch.linspace(0.01, math.pi / 2, size.samples, dtype=exact, device=device)
    keep = torch.arange(size.samples, device=device) % 4 != 3
    return F.requires_grad_(), g, logvar.requires_grad_(), t, keep, size.samples, 0.5


OPERATOR = Operator("consistency_loss", consistency_loss, reference, inputs, cost, backward_cost, has_tangents=False)
