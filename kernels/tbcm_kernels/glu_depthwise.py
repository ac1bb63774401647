"""The middle of Sana's Mix-FFN on channels-last tokens: SiLU, depthwise 3 x 3 convolution over the grid, gate.

x [B, T, 2 C], T = rows x columns tokens; s = silu(x); (a, b) = d = conv(s), zero padding of 1; y = a silu(b) [B, T, C].
Tangent: dd = conv(silu'(x) dx) without the bias; dy = da silu(b) + a silu'(b) db. Backward saves x, weight and bias.

The kernel: a program has a strip of 8 columns and 32 channels of both halves, one a thread, and marches down the rows.
Of each row of x it loads the strip and one column on each side, evaluates SiLU, and adds the row to the three rows of d
that neighbour it, which are in registers; the upper one is then complete. So SiLU is evaluated 1.25 times an element
(shifted loads of tiles would evaluate it 9 times; the special function unit has time for about 1.5 at the speed of the
memory). L2 is asked for 1.25 elements for each of x; the margins are not read from memory twice, as programs of
neighbouring strips run at the same time. Device memory sees 3 C elements a token, 6 C with tangents. Instructions per
element of x are 26, with tangents 46: on an H100 they take about as long as these bytes.
"""

# mypy: disable-error-code="assignment"
# Kernels build tuples pixel by pixel, each longer than the last.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbcm_kernels import dispatch
from tbcm_kernels.catalog import Cost, Dual, Operator, Size, nbytes
from tbcm_kernels.glu_depthwise_backward import (
    BLOCK,
    channels_of,
    constants,
    convolve,
    glu_depthwise_backward,
    load_row,
    load_taps,
    sigmoid,
    store_row,
    strip_of,
)
from tbcm_kernels.launch import jit, launch, operator, tl

_PROGRAMS = 4000  # two for every warp that a large card has room for


def glu_depthwise(x: Dual, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Dual:
    """y [B, T, C] = a silu(b) with (a, b) = conv(silu(x)), and its tangent.

    x [B, T, 2 C] and its tangent, T = rows x columns; weight [2 C, 1, 3, 3]; bias [2 C] or None; size (rows, columns).
    y has x's dtype; weight and bias may have others. Raises ValueError where the shapes do not agree.
    """
    value, tangent = x
    _check(value, weight, bias, size)
    large = "samples of 2**31 elements or more" if value.shape[1] * value.shape[2] >= 2**31 else None
    if not dispatch.fused("glu_depthwise", value, tangent, weight, bias, unsupported=large):
        return reference(x, weight, bias, size)
    if tangent is None:
        return _plain(value, weight, bias, *size), None
    return _dual(value, tangent.detach(), weight, bias, *size)


def reference(x: Dual, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Dual:
    """In plain PyTorch, with intermediates in x's dtype."""
    value, tangent = x
    with torch.autocast(value.device.type, enabled=False):
        a, b = _convolution(functional.silu(value), weight, bias, size).chunk(2, -1)
        y = a * functional.silu(b)
        if tangent is None:
            return y, None
        with torch.no_grad():
            da, db = _convolution(_slope(value) * tangent, weight, None, size).chunk(2, -1)
            return y, da * functional.silu(b) + a * (_slope(b) * db)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> None:
    tokens, channels = x.shape[1:]
    if tokens != size[0] * size[1] or channels % 2 or weight.shape != (channels, 1, 3, 3):
        raise ValueError(f"x {[*x.shape]} over a grid of {size} and weight {[*weight.shape]}: want [B, {size[0]} x"
                         f" {size[1]}, 2 C] and [2 C, 1, 3, 3]")  # fmt: skip
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias {[*bias.shape]} for {channels} channels")


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    image = x.unflatten(1, size).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    out = functional.conv2d(image, weight.to(x.dtype), bias, padding=1, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def _slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


@jit
def _activate(x, tx, COUNT: tl.constexpr, DUAL: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """silu(x) of COUNT pixels, and its tangent."""
    s, ts = (), ()
    for j in tl.static_range(COUNT):
        value = x[j].to(WIDE)
        g = sigmoid(value, FAST)
        u = value * g
        s += (u,)
        if DUAL:
            ts += ((g + u * (1 - g)) * tx[j].to(WIDE),)
    return s, ts


@jit
def _gate(a, b, ta, tb, COUNT: tl.constexpr, DUAL: tl.constexpr, FAST: tl.constexpr):
    """a silu(b) of COUNT pixels, and its tangent."""
    y, ty = (), ()
    for j in tl.static_range(COUNT):
        g = sigmoid(b[j], FAST)
        u = b[j] * g
        y += (a[j] * u,)
        if DUAL:
            ty += (ta[j] * u + a[j] * (g + u * (1 - g)) * tb[j],)
    return y, ty


@jit
def glu_depthwise_kernel(
    x, tx, weight, bias, y, ty, rows, columns, band,
    DUAL: tl.constexpr, C: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Program (channels, strip, sample and band): `band` rows of y and ty [B, T, C] from x and tx [B, T, 2 C]."""
    channel, mask = channels_of(tl.program_id(0), C, BLOCK)
    column = tl.program_id(1) * STRIP
    bands = tl.cdiv(rows, band)
    pixel = (tl.program_id(2) // bands).to(tl.int64) * rows * columns
    first = tl.program_id(2) % bands * band
    last = tl.minimum(first + band, rows)
    x += pixel * (2 * C) + channel
    y += pixel * C + channel
    if DUAL:
        tx += pixel * (2 * C) + channel
        ty += pixel * C + channel
    taps_a, bias_a = load_taps(weight, bias, channel, mask, WIDE)
    taps_b, bias_b = load_taps(weight, bias, C + channel, mask, WIDE)
    zero = tl.zeros((BLOCK,), WIDE)
    upper_a, lower_a = (bias_a,) * STRIP, (bias_a,) * STRIP
    upper_b, lower_b = (bias_b,) * STRIP, (bias_b,) * STRIP
    t_upper_a, t_lower_a, t_upper_b, t_lower_b = (zero,) * STRIP, (zero,) * STRIP, (zero,) * STRIP, (zero,) * STRIP
    for r in range(tl.maximum(first - 1, 0), last + 1):
        x_a = load_row(x, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 1)
        x_b = load_row(x + C, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 1)
        tx_a, tx_b, t_a, t_b = (), (), (), ()
        if DUAL:
            tx_a = load_row(tx, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 1)
            tx_b = load_row(tx + C, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 1)
        s_a, ts_a = _activate(x_a, tx_a, STRIP + 2, DUAL, WIDE, FAST)
        s_b, ts_b = _activate(x_b, tx_b, STRIP + 2, DUAL, WIDE, FAST)
        a, upper_a, lower_a = convolve(upper_a, lower_a, s_a, taps_a, bias_a, STRIP)
        b, upper_b, lower_b = convolve(upper_b, lower_b, s_b, taps_b, bias_b, STRIP)
        if DUAL:
            t_a, t_upper_a, t_lower_a = convolve(t_upper_a, t_lower_a, ts_a, taps_a, zero, STRIP)
            t_b, t_upper_b, t_lower_b = convolve(t_upper_b, t_lower_b, ts_b, taps_b, zero, STRIP)
        out, t_out = _gate(a, b, t_a, t_b, STRIP, DUAL, FAST)
        if r > first:
            store_row(y, out, r - 1, column, columns, mask, C, STRIP, WHOLE)
            if DUAL:
                store_row(ty, t_out, r - 1, column, columns, mask, C, STRIP, WHOLE)


def _launch(
    x: Tensor, tx: Tensor | None, weight: Tensor, bias: Tensor | None, rows: int, columns: int
) -> tuple[Tensor, Tensor | None]:
    samples, tokens, width = x.shape
    channels = width // 2
    x, weight = x.contiguous(), weight.contiguous()
    tx, bias = (None if given is None else given.contiguous() for given in (tx, bias))
    y = x.new_empty(samples, tokens, channels)
    ty = None if tx is None else torch.empty_like(y)
    blocks, strips = -(-channels // BLOCK), -(-columns // strip_of(columns))
    band = rows
    while band > 8 and blocks * strips * samples * -(-rows // band) < _PROGRAMS:
        band = -(-band // 2)  # each band reads two rows more
    options: dict[str, Any] = {"maxnreg": 128 if tx is None else 168}  # registers: 16 or 12 warps on a multiprocessor
    launch(
        glu_depthwise_kernel,
        (blocks, strips, samples * -(-rows // band)),
        *(x, tx, weight, bias, y, ty, rows, columns, band),
        DUAL=tx is not None,
        **constants(x, channels, columns),
        **options,
    )
    return y, ty


@operator("tbcm::glu_depthwise")
def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    return _launch(x, None, weight, bias, rows, columns)[0]


@operator("tbcm::glu_depthwise_dual")
def _dual(x: Tensor, tx: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    y, ty = _launch(x, tx, weight, bias, rows, columns)
    assert ty is not None
    return y, ty


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, weight, bias, rows, columns = inputs
    ctx.save_for_backward(inputs[0], weight, bias)
    ctx.size = rows, columns
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = glu_depthwise_backward(dy, x, weight, bias, *ctx.size)
    return dx, dweight, None if bias is None else dbias, None, None


def _dual_backward(ctx: Any, dy: Tensor | None, dty: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, *others = _backward(ctx, dy)
    return dx, None, *others


_plain.register_autograd(_backward, setup_context=_save)
_dual.register_autograd(_dual_backward, setup_context=_save)


# Floating-point operations an element: SiLU 4 (exponential, sum, quotient, product) and its slope 3 more; a convolution
# of 9 products and sums.
def _cost(x: Dual, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Cost:
    value, tangent = x
    gates = value.numel() // 2
    flops = value.numel() * (4 + 18) + gates * 5
    if tangent is not None:
        flops += value.numel() * (4 + 18) + gates * 7
    return Cost(flops, nbytes(value, tangent, weight, bias) + nbytes(value, tangent) // 2)


def _backward_cost(x: Dual, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Cost:
    value = x[0]
    gates = value.numel() // 2
    flops = value.numel() * (4 + 18 + 4 + 18 + 19) + gates * 10
    return Cost(flops, 2 * nbytes(value, weight, bias) + nbytes(value) // 2)


def _inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    width = 2 * size.hidden
    x = torch.randn(size.samples, size.tokens, width, dtype=dtype, device=device)
    tangent = torch.randn_like(x) if tangents else None
    weight = torch.randn(width, 1, 3, 3, device=device) / 3
    bias = torch.randn(width, device=device)
    return (x.requires_grad_(), tangent), weight.requires_grad_(), bias.requires_grad_(), (size.rows, size.columns)


OPERATOR = Operator("glu_depthwise", glu_depthwise, reference, _inputs, _cost, _backward_cost)
