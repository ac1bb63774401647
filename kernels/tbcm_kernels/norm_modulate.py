"""LayerNorm with a shift and a scale per sample (adaptive layer norm), plain and dual.

    n = (x - mean) / sqrt(variance + eps),    y = n (1 + scale) + shift

mean and variance (biased) over the D columns of a token, in fp32. Tangents, with s = sqrt(variance + eps):

    dn = (dx - mean(dx) - n mean(n dx)) / s,    dy = dn (1 + scale) + n dscale + dshift

A program takes a token: all is read once and written once. The same kernel first adds a gated residual, where there is
one (`residual_norm_modulate`). Saved for backward: x, scale, and mean and 1 / s of each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbcm_kernels.catalog import Cost, Dual, Operator, Size, nbytes
from tbcm_kernels.dispatch import fused
from tbcm_kernels.launch import exact_product, jit, launch, operator, tl
from tbcm_kernels.norm_modulate_backward import (
    columns_of,
    norm_modulate_backward,
    row_constants,
    row_sum,
    vector,
)

WIDEST = 8192

Optional = tuple[Tensor | None, Tensor | None]
"""A dual number, or nothing."""

NONE: Optional = (None, None)


def norm_modulate(x: Dual, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> Dual:
    """LayerNorm(x) (1 + scale) + shift as `dtype`: x [B, T, D], shift and scale [B, 1, D] of any dtypes.

    There is a tangent where all three have one. It is as `dtype` too.
    """
    return stream_and_norm(x, shift, scale, eps, dtype)[1]


def stream_and_norm(x: Dual, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> tuple[Dual, Dual]:
    """x, for who goes on with it, and `norm_modulate` of it. Gradients of both are added up in the norm's own pass."""
    values, tangents = zip(x, shift, scale, strict=True)
    if not fused("norm_modulate", *values, *tangents, unsupported=unsupported(x[0], shift[0], scale[0])):
        return x, reference(x, shift, scale, eps, dtype)
    dual = all(tangent is not None for tangent in tangents)
    of_value, y, dy, _ = _Norm.apply(*values, *(tangents if dual else (None,) * 3), eps, dtype)
    return (of_value, x[1]), (y, dy)


def unsupported(x: Tensor, *vectors: Tensor) -> str | None:
    """What the kernels cannot do of tokens x [B, T, D] with vectors [B, 1, D]."""
    if x.dim() != 3 or any(vector.shape != (x.shape[0], 1, x.shape[2]) for vector in vectors):
        return f"tokens {list(x.shape)} with vectors {[list(vector.shape) for vector in vectors]}"
    return f"tokens {x.shape[2]} wide, more than {WIDEST}" if x.shape[2] > WIDEST else None


def reference(x: Dual, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> Dual:
    """`norm_modulate` in plain PyTorch."""
    wide = torch.promote_types(x[0].dtype, torch.float32)
    normal = functional.layer_norm(x[0].to(wide), x[0].shape[-1:], eps=eps)
    y = (normal * (1 + scale[0].to(wide)) + shift[0].to(wide)).to(dtype)
    if x[1] is None or shift[1] is None or scale[1] is None:
        return y, None
    with torch.no_grad():
        variance = x[0].to(wide).var(-1, correction=0, keepdim=True)
        dx = x[1].to(wide)
        dx = dx - dx.mean(-1, keepdim=True)
        dn = torch.rsqrt(variance + eps) * (dx - normal * (normal * dx).mean(-1, keepdim=True))
        dy = dn * (1 + scale[0].to(wide)) + normal * scale[1].to(wide) + shift[1].to(wide)
        return y, dy.to(dtype)


@jit
def _norm_modulate_kernel(
    h, dh, x, dx, gate, dgate, shift, dshift, scale, dscale, out, dout, y, dy, stats,
    gate_stride, dgate_stride, shift_stride, dshift_stride, scale_stride, dscale_stride, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A token: normalised and modulated into y; where there is an x, of out = h + gate x. Its tangent where there is a
    dy, which leaves the value's arithmetic alone: its products that are added up are rounded first."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    columns = columns_of(BLOCK, VECTOR)
    inside = columns < D
    at = row * D
    value = tl.load(h + at + columns, mask=inside, other=0.0).to(WIDE)
    tangent = value
    if dy is not None:
        tangent = tl.load(dh + at + columns, mask=inside, other=0.0).to(WIDE)
    if x is not None:
        branch = tl.load(x + at + columns, mask=inside, other=0.0).to(WIDE)
        branch_tangent = branch
        if dy is not None:
            branch_tangent = tl.load(dx + at + columns, mask=inside, other=0.0).to(WIDE)
        if gate is not None:
            g = tl.load(gate + sample * gate_stride + columns, mask=inside, other=0.0).to(WIDE)
            if dy is not None:
                dg = tl.load(dgate + sample * dgate_stride + columns, mask=inside, other=0.0).to(WIDE)
                branch_tangent = dg * branch + g * branch_tangent
            branch = exact_product(g, branch)
        rounded = (value + branch).to(out.dtype.element_ty)
        tl.store(out + at + columns, rounded, mask=inside)
        value = rounded.to(WIDE)
        if dy is not None:
            rounded_tangent = (tangent + branch_tangent).to(out.dtype.element_ty)
            tl.store(dout + at + columns, rounded_tangent, mask=inside)
            tangent = rounded_tangent.to(WIDE)

    mean = row_sum(value) / D
    # What rounding left of the mean: it matters in tokens far from zero.
    mean += row_sum(tl.where(inside, value - mean, 0.0)) / D
    centred = tl.where(inside, value - mean, 0.0)
    inverse = tl.rsqrt(row_sum(exact_product(centred, centred)) / D + EPS)
    tl.store(stats + row * 2, mean)
    tl.store(stats + row * 2 + 1, inverse)
    normal = centred * inverse
    factor = 1.0 + tl.load(scale + sample * scale_stride + columns, mask=inside, other=0.0).to(WIDE)
    offset = tl.load(shift + sample * shift_stride + columns, mask=inside, other=0.0).to(WIDE)
    tl.store(y + at + columns, exact_product(normal, factor) + offset, mask=inside)
    if dy is not None:
        tangent = tl.where(inside, tangent - row_sum(tangent) / D, 0.0)
        tangent = inverse * (tangent - normal * (row_sum(normal * tangent) / D))
        dfactor = tl.load(dscale + sample * dscale_stride + columns, mask=inside, other=0.0).to(WIDE)
        doffset = tl.load(dshift + sample * dshift_stride + columns, mask=inside, other=0.0).to(WIDE)
        tl.store(dy + at + columns, tangent * factor + normal * dfactor + doffset, mask=inside)


def normalise(
    h: Dual, x: Optional, gate: Optional, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Runs the kernel: h + gate x (nothing without an x), the norm as `dtype`, and mean and 1 / s [B, T, 2].

    The first two are values, followed by their tangents where there are tangents.
    """
    samples, tokens, width = h[0].shape
    # Tangents have their values' dtypes, so that the layout of a row, and the order of its sums, is the same without.
    streams = [None if t is None or v is None else t.to(v.dtype).contiguous() for v, d in (h, x) for t in (v, d)]
    vectors, strides = zip(*(vector(t) for pair in (gate, shift, scale) for t in pair), strict=True)
    count = 1 if h[1] is None else 2
    sums = [] if x[0] is None else [h[0].new_empty(h[0].shape) for _ in range(count)]
    ys = [h[0].new_empty(h[0].shape, dtype=dtype) for _ in range(count)]
    out, dout, y, dy = (*sums, None, None)[:2] + (*ys, None)[:2]
    stats = empty_stats(h[0])
    launch(
        _norm_modulate_kernel, (samples * tokens,), *streams, *vectors, out, dout, y, dy, stats, *strides, tokens,
        EPS=eps, **row_constants(width, h[0], x[0], y),
    )  # fmt: skip
    return sums, ys, stats


def empty_stats(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2), dtype=torch.promote_types(x.dtype, torch.float32))


@operator("tbcm::norm_modulate")
def _plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, (y,), stats = normalise((x, None), NONE, NONE, (shift, None), (scale, None), eps, dtype)
    return y, stats


@operator("tbcm::norm_modulate_dual")
def _dual(
    x: Tensor, dx: Tensor, shift: Tensor, dshift: Tensor, scale: Tensor, dscale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _, (y, dy), stats = normalise((x, dx), NONE, NONE, (shift, dshift), (scale, dscale), eps, dtype)
    return y, dy, stats


class _Norm(torch.autograd.Function):
    """x as it is, its norm, the tangent of that where there are tangents, and what backward needs."""

    @staticmethod
    def forward(
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        dx: Tensor | None,
        dshift: Tensor | None,
        dscale: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        if dx is None:
            y, stats = _plain(x, shift, scale, eps, dtype)
            return x.view_as(x), y, None, stats
        return x.view_as(x), *_dual(x, dx, shift, dshift, scale, dscale, eps, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, shift, scale, *_ = inputs
        _, _, dy, stats = output
        ctx.save_for_backward(x, scale, stats)
        ctx.shift_dtype = shift.dtype
        ctx.mark_non_differentiable(*(result for result in (dy, stats) if result is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, to_stream: Tensor | None, to_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        others = (None,) * 5
        if to_y is None:
            return to_stream, None, None, *others
        x, scale, stats = ctx.saved_tensors
        to_x, sums = norm_modulate_backward(to_stream, to_y, x, scale, stats)
        return to_x, sums[:, :1].to(ctx.shift_dtype), sums[:, 1:].to(scale.dtype), *others


def cost(x: Dual, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> Cost:
    """9 operations an element and 13 for its tangent; all is read once, and y is written, with its tangent."""
    flops, copies = (9, 1) if x[1] is None else (22, 2)
    return Cost(flops * x[0].numel(), nbytes(*x, *shift, *scale) + copies * x[0].numel() * dtype.itemsize)


def backward_cost(x: Dual, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> Cost:
    """14 operations an element; x, scale and y's gradient are read, the gradients of x, shift and scale written."""
    moved = nbytes(x[0], x[0], shift[0], scale[0], scale[0])
    return Cost(14 * x[0].numel(), moved + x[0].numel() * dtype.itemsize)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """As in a block under autocast: the residual stream and the modulation, a chunk of six, are fp32."""
    exact = torch.promote_types(dtype, torch.float32)
    x = stream(size, exact, device, tangents)
    shift, scale = modulation(size, exact, device, tangents, 2)
    return x, shift, scale, 1e-6, dtype


def stream(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> Dual:
    """Random tokens [B, T, D]."""
    x = torch.randn(size.samples, size.tokens, size.dim, dtype=dtype, device=device, requires_grad=True)
    return x, torch.randn_like(x) if tangents else None


def modulation(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool, count: int) -> list[Dual]:
    """`count` random vectors [B, 1, D], which are strided views."""

    def chunks() -> tuple[Tensor, ...]:
        return torch.randn(size.samples, 6, size.dim, dtype=dtype, device=device).chunk(6, 1)[:count]

    return list(
        zip((chunk.requires_grad_() for chunk in chunks()), chunks() if tangents else [None] * count, strict=True)
    )


OPERATOR = Operator("norm_modulate", norm_modulate, reference, inputs, cost, backward_cost)
