"""The residual stream's update by a gated branch, alone and with the norm that follows it; plain and dual.

    h' = h + gate x,    dh' = dh + dgate x + gate dx,    and then    y = LayerNorm(h') (1 + scale) + shift

h and x [B, T, D], gate, shift and scale [B, 1, D]. h' has h's dtype. Everything is read once and written once. Saved
for backward: x and gate; with the norm also h', scale, and mean and reciprocal standard deviation of each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import norm_modulate
from tbcm_kernels.catalog import Cost, Dual, Operator, Size, nbytes
from tbcm_kernels.dispatch import fused
from tbcm_kernels.gated_residual_backward import ROWS, gated_residual_backward, tile, tile_constants
from tbcm_kernels.launch import exact_product, jit, launch, operator, tl, triton
from tbcm_kernels.norm_modulate import NONE, modulation, normalise, stream, unsupported
from tbcm_kernels.norm_modulate_backward import norm_modulate_backward, residual_norm_modulate_backward, vector


def gated_residual(h: Dual, gate: Dual, x: Dual) -> Dual:
    """h + gate x in h's dtype: h and x [B, T, D], gate [B, 1, D]. There is a tangent where all three have one."""
    return gated_residual_and_copy(h, gate, x, h[0].dtype)[0]


def gated_residual_and_copy(h: Dual, gate: Dual, x: Dual, dtype: torch.dtype) -> tuple[Dual, Dual]:
    """`gated_residual`, and the same as `dtype`, for a layer that takes it so. Gradients of both are added up in one
    pass."""
    values, tangents = zip(h, gate, x, strict=True)
    if not fused("gated_residual", *values, *tangents, unsupported=_mismatch(h, x) or unsupported(h[0], gate[0])):
        y = reference(h, gate, x)
        return y, (y[0].to(dtype), None if y[1] is None else y[1].to(dtype))
    copied = None if dtype == h[0].dtype else dtype
    if any(tangent is None for tangent in tangents):
        value, of_value = _plain(*values, copied)
        return (value, None), (value if copied is None else of_value, None)
    value, tangent, *copies = _dual(*h, *gate, *x, copied)
    return (value, tangent), (value, tangent) if copied is None else (copies[0], copies[1])


def residual_norm_modulate(
    h: Dual, x: Dual, gate: Dual | None, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype
) -> tuple[Dual, Dual]:
    """h' = h + gate x (without a gate: h + x) in h's dtype, and LayerNorm(h') (1 + scale) + shift as `dtype`.

    There are tangents where all arguments have one.
    """
    given = [h, x, shift, scale] + ([] if gate is None else [gate])
    values, tangents = zip(*given, strict=True)
    problem = _mismatch(h, x) or unsupported(h[0], *values[2:])
    if not fused("residual_norm_modulate", *values, *tangents, unsupported=problem):
        return norm_reference(h, x, gate, shift, scale, eps, dtype)
    g = gate or NONE
    if any(tangent is None for tangent in tangents):
        out, y, _ = _plain_norm(h[0], x[0], g[0], shift[0], scale[0], eps, dtype)
        return (out, None), (y, None)
    out, dout, y, dy, _ = _dual_norm(*h, *x, *g, *shift, *scale, eps, dtype)
    return (out, dout), (y, dy)


def _mismatch(h: Dual, x: Dual) -> str | None:
    return None if h[0].shape == x[0].shape else f"a stream {list(h[0].shape)} and a branch {list(x[0].shape)}"


def reference(h: Dual, gate: Dual | None, x: Dual) -> Dual:
    """`gated_residual` in plain PyTorch; without a gate h + x."""
    dtype = h[0].dtype
    y = (h[0] + (x[0] if gate is None else gate[0] * x[0])).to(dtype)
    if h[1] is None or x[1] is None:
        return y, None
    with torch.no_grad():
        if gate is None:
            return y, (h[1] + x[1]).to(dtype)
        return y, None if gate[1] is None else (h[1] + gate[1] * x[0] + gate[0] * x[1]).to(dtype)


def norm_reference(
    h: Dual, x: Dual, gate: Dual | None, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype
) -> tuple[Dual, Dual]:
    """`residual_norm_modulate` in plain PyTorch."""
    out = reference(h, gate, x)
    y = norm_modulate.reference(out, shift, scale, eps, dtype)
    return (out, y) if y[1] is not None else ((out[0], None), y)


@jit
def _gated_residual_kernel(
    h, dh, gate, dgate, x, dx, y, dy, copy, dcopy, gate_stride, dgate_stride, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS tokens by COLUMNS columns of y = h + gate x; the tangent too where there is a dy, with the same value; and
    both once more where there is a copy."""
    strips: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    rows, columns = tile(ROWS, COLUMNS, VECTOR)
    first = tl.program_id(0) // strips * ROWS
    columns += tl.program_id(0) % strips * COLUMNS
    sample = tl.program_id(1).to(tl.int64)
    start = (sample * tokens + first) * D
    at = rows * D + columns
    inside = (first + rows < tokens) & (columns < D)
    value = tl.load(h + start + at, mask=inside, other=0.0).to(WIDE)
    branch = tl.load(x + start + at, mask=inside, other=0.0).to(WIDE)
    g = tl.load(gate + sample * gate_stride + columns, mask=columns < D, other=0.0).to(WIDE)
    if dy is not None:
        tangent = tl.load(dh + start + at, mask=inside, other=0.0).to(WIDE)
        branch_tangent = tl.load(dx + start + at, mask=inside, other=0.0).to(WIDE)
        dg = tl.load(dgate + sample * dgate_stride + columns, mask=columns < D, other=0.0).to(WIDE)
        tangent = (tangent + (dg * branch + g * branch_tangent)).to(dy.dtype.element_ty)
        tl.store(dy + start + at, tangent, mask=inside)
        if copy is not None:
            tl.store(dcopy + start + at, tangent, mask=inside)
    value = (value + exact_product(g, branch)).to(y.dtype.element_ty)
    tl.store(y + start + at, value, mask=inside)
    if copy is not None:
        tl.store(copy + start + at, value, mask=inside)


def _add(h: Dual, gate: Dual, x: Dual, copied: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    """Runs the kernel: the value, followed by its tangent where there are tangents; and the same as `copied` (None:
    without elements)."""
    samples, tokens, width = h[0].shape
    (g, g_stride), (dg, dg_stride) = vector(gate[0]), vector(gate[1])
    streams = [None if t is None else t.contiguous() for t in (*h, *x)]
    ys = [h[0].new_empty(h[0].shape) for t in h if t is not None]
    copies = [y.new_empty(0 if copied is None else y.shape, dtype=copied) for y in ys]
    results = (*ys, None)[:2] + ((None, None) if copied is None else (*copies, None)[:2])
    constants = tile_constants(width, h[0], x[0])
    grid = triton.cdiv(tokens, ROWS) * triton.cdiv(width, constants["COLUMNS"]), samples
    launch(
        _gated_residual_kernel, grid, *streams[:2], g, dg, *streams[2:], *results, g_stride, dg_stride, tokens,
        **constants,
    )  # fmt: skip
    return ys, copies


@operator("tbcm::gated_residual")
def _plain(h: Tensor, gate: Tensor, x: Tensor, copied: torch.dtype | None) -> tuple[Tensor, Tensor]:
    (y,), (copy,) = _add((h, None), (gate, None), (x, None), copied)
    return y, copy


@operator("tbcm::gated_residual_dual")
def _dual(
    h: Tensor, dh: Tensor, gate: Tensor, dgate: Tensor, x: Tensor, dx: Tensor, copied: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (y, dy), (copy, dcopy) = _add((h, dh), (gate, dgate), (x, dx), copied)
    return y, dy, copy, dcopy


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of either: the plain operator's inputs are the dual's without their tangents."""
    ctx.dual = len(inputs) == 7
    h, gate, x = inputs[:6:2] if ctx.dual else inputs[:3]
    ctx.h_dtype = h.dtype
    ctx.save_for_backward(gate, x)
    ctx.set_materialize_grads(False)
    if ctx.dual:
        ctx.mark_non_differentiable(*output[1::2])


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    to_h, of_copy = gradients[::2] if ctx.dual else gradients
    to_gate, to_x = None, None
    given = of_copy if to_h is None else to_h
    if given is not None:
        gate, x = ctx.saved_tensors
        if to_h is None:
            to_h = torch.zeros_like(given, dtype=ctx.h_dtype)
        to_x, to_gate, both = gated_residual_backward(to_h, of_copy, gate, x)
        to_h = to_h if of_copy is None else both
    return (to_h, None, to_gate, None, to_x, None, None) if ctx.dual else (to_h, to_gate, to_x, None)


_plain.register_autograd(_backward, setup_context=_save)
_dual.register_autograd(_backward, setup_context=_save)


@operator("tbcm::residual_norm_modulate")
def _plain_norm(
    h: Tensor, x: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    (out,), (y,), stats = normalise((h, None), (x, None), (gate, None), (shift, None), (scale, None), eps, dtype)
    return out, y, stats


@operator("tbcm::residual_norm_modulate_dual")
def _dual_norm(
    h: Tensor,
    dh: Tensor,
    x: Tensor,
    dx: Tensor,
    gate: Tensor | None,
    dgate: Tensor | None,
    shift: Tensor,
    dshift: Tensor,
    scale: Tensor,
    dscale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shift_scale = (shift, dshift), (scale, dscale)
    (out, dout), (y, dy), stats = normalise((h, dh), (x, dx), (gate, dgate), *shift_scale, eps, dtype)
    return out, dout, y, dy, stats


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of either, as `_save`."""
    ctx.dual = len(inputs) == 12
    _, x, gate, shift, scale = inputs[:10:2] if ctx.dual else inputs[:5]
    ctx.save_for_backward(output[0], None if gate is None else x, gate, scale, output[-1])
    ctx.x_dtype, ctx.shift_dtype = x.dtype, shift.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1::2], output[-1]) if ctx.dual else ctx.mark_non_differentiable(output[-1])


def _backward_norm(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    to_out, to_y = gradients[:3:2] if ctx.dual else gradients[:2]
    result: list[Tensor | None] = [None] * 5
    if to_out is not None or to_y is not None:
        out, x, gate, scale, stats = ctx.saved_tensors
        if to_y is None:
            to_y = torch.zeros_like(out)
        if gate is None and ctx.x_dtype == out.dtype:
            to_h, sums = norm_modulate_backward(to_out, to_y, out, scale, stats)
            to_x = to_h
        else:
            arguments = to_out, to_y, out, x, gate, scale, stats, ctx.x_dtype
            to_h, to_x, sums = residual_norm_modulate_backward(*arguments)
        to_gate = None if gate is None else sums[:, 2:].to(gate.dtype)
        result = [to_h, to_x, to_gate, sums[:, :1].to(ctx.shift_dtype), sums[:, 1:2].to(scale.dtype)]
    if ctx.dual:
        result = [gradient for each in result for gradient in (each, None)]
    return *result, None, None


_plain_norm.register_autograd(_backward_norm, setup_context=_save_norm)
_dual_norm.register_autograd(_backward_norm, setup_context=_save_norm)


def cost(h: Dual, gate: Dual, x: Dual) -> Cost:
    """2 operations an element and 4 for its tangent; all is read once, and h' is written, with its tangent."""
    return Cost((2 if h[1] is None else 6) * h[0].numel(), nbytes(*h, *gate, *x, *h))


def backward_cost(h: Dual, gate: Dual, x: Dual) -> Cost:
    """3 operations an element; the gradient of h', gate and x are read, the gradients of gate and x written."""
    return Cost(3 * h[0].numel(), nbytes(h[0], gate[0], x[0], gate[0], x[0]))


def norm_cost(h: Dual, x: Dual, gate: Dual | None, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype) -> Cost:
    """Of the sum and of its norm, without h' being read again."""
    added = cost(h, gate or (h[0][:, :0], None), x)
    normed = norm_modulate.cost(h, shift, scale, eps, dtype)
    return Cost(added.flops + normed.flops, added.bytes + normed.bytes - nbytes(*h))


def norm_backward_cost(
    h: Dual, x: Dual, gate: Dual | None, shift: Dual, scale: Dual, eps: float, dtype: torch.dtype
) -> Cost:
    """17 operations an element; the gradients of h' and y, h', scale, and with a gate that and x, are read, and the
    gradients of all arguments written."""
    gated = () if gate is None else (gate[0], gate[0], x[0])
    moved = nbytes(h[0], h[0], h[0], x[0], shift[0], scale[0], scale[0], *gated)
    return Cost(17 * h[0].numel(), moved + h[0].numel() * dtype.itemsize)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """As in a block under autocast: the stream and the gate, a chunk of six, are fp32, the branch is not."""
    exact = torch.promote_types(dtype, torch.float32)
    (gate,) = modulation(size, exact, device, tangents, 1)
    return stream(size, exact, device, tangents), gate, stream(size, dtype, device, tangents)


def norm_inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """As `inputs`, with the modulation of the norm."""
    exact = torch.promote_types(dtype, torch.float32)
    vectors = modulation(size, exact, device, tangents, 3)
    return stream(size, exact, device, tangents), stream(size, dtype, device, tangents), *vectors, 1e-6, dtype


OPERATOR = Operator("gated_residual", gated_residual, reference, inputs, cost, backward_cost)
NORM_OPERATOR = Operator(
    "residual_norm_modulate", residual_norm_modulate, norm_reference, norm_inputs, norm_cost, norm_backward_cost
)
