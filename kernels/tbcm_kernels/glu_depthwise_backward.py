"""The gradient of `tbcm_kernels.glu_depthwise`, and the parts that its kernels are made of.

With s = silu(x), (a, b) = d = conv(s) and y = a silu(b), given dy:

    da = dy silu(b),  db = dy a silu'(b),  dd = (da, db),
    dx(q) = silu'(x(q)) sum_k w[k] dd(q - k),  dw[k] = sum_q s(q) dd(q - k),  dbias = sum dd.

Nothing of the forward pass is needed but x. One kernel rebuilds s, d and dd and keeps them in registers: a program has
one strip of 8 columns and 32 channels of both halves, and marches down the rows of its samples. At row r it completes d
and dd of row r - 1, one column wider than the strip on each side, and from dd of rows r - 1, r - 2 and r - 3 the
gradients of row r - 2. Reading x with a margin of 2 and dy with one of 1, and x of row r - 2 once more, it asks the
caches for 2.5 elements for each of x and 1.25 for each of dy. Device memory sees each once, and dx: 5 C elements a
token. Every program writes its own sums of dw and dbias, which a second kernel adds up (no atomics: the same in every
run): about 6 % more on a grid of 32 x 32, partly in L2. Storing dd between two kernels would make it 11 C. Instructions
per element of x: 65, of which an H100 issues 50 or so in the time of these bytes: it is they that bind.
"""

# mypy: disable-error-code="assignment"
# Kernels build tuples pixel by pixel, each longer than the last.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels import dispatch
from tbcm_kernels.launch import jit, launch, operator, tl, wide

BLOCK = 32  # channels of a program: a warp, whose threads have one each
_PROGRAMS = 6000  # enough to fill the largest cards several times over


def strip_of(columns: int) -> int:
    """How many columns a program has: 8 fill the registers."""
    return min(8, 1 << (columns - 1).bit_length())


def constants(x: Tensor, channels: int, columns: int) -> dict[str, Any]:
    """What all kernels of the operator are compiled for. Addresses are constants with `channels` known."""
    kind = wide(x.dtype)
    fast = kind == tl.float32 and dispatch.mode() != "interpret"
    return {
        "C": channels,
        "STRIP": strip_of(columns),
        "WHOLE": columns % strip_of(columns) == 0,
        "BLOCK": BLOCK,
        "WIDE": kind,
        "FAST": fast,
        "num_warps": 1,
    }


@jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: two instructions of the special function unit, to about 2 units in the last place; Triton's exponential and
    quotient, no more precise, add six that take care of subnormal numbers. e^-x of inf gives 0."""
    if FAST:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / (1 + tl.exp(-x))


@jit
def load_taps(weight, bias, channel, mask, WIDE: tl.constexpr):
    """The 9 weights of every channel and its bias."""
    taps = ()
    for k in tl.static_range(9):
        taps += (tl.load(weight + channel * 9 + k, mask, other=0).to(WIDE),)
    if bias is None:
        return taps, tl.zeros(channel.shape, WIDE)
    else:
        return taps, tl.load(bias + channel, mask, other=0).to(WIDE)


@jit
def channels_of(program, C: tl.constexpr, BLOCK: tl.constexpr):
    """A program's channels, and which of them there are."""
    channel = program * BLOCK + tl.arange(0, BLOCK)
    if C % BLOCK == 0:
        return channel, tl.full((BLOCK,), True, tl.int1)
    else:
        return channel, channel < C


@jit
def load_row(
    x, row, rows, column, columns, mask, PITCH: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """STRIP pixels of x [rows, columns, PITCH] from (row, column), and MARGIN on each side; those outside are 0. WHOLE:
    no strip is cut off by the edge."""
    pixels = ()
    x += (row * columns + column) * PITCH
    here = tl.where((row >= 0) & (row < rows), mask, False)
    for j in tl.static_range(-MARGIN, STRIP + MARGIN):
        inside = here
        if (not WHOLE) | (j < 0) | (j >= STRIP):
            inside = tl.where((column + j >= 0) & (column + j < columns), here, False)
        pixels += (tl.load(x + j * PITCH, inside, other=0),)
    return pixels


@jit
def store_row(
    y, pixels, row, column, columns, mask, PITCH: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """STRIP pixels of y [rows, columns, PITCH] from (row, column); `row` is inside."""
    y += (row * columns + column) * PITCH
    for j in tl.static_range(STRIP):
        inside = mask
        if not WHOLE:
            inside = tl.where(column + j < columns, mask, False)
        tl.store(y + j * PITCH, pixels[j].to(y.dtype.element_ty), inside)


@jit
def convolve(upper, lower, s, taps, bias, COUNT: tl.constexpr):
    """Adds a row s of COUNT + 2 pixels to the three rows of COUNT pixels that it is a neighbour of: the row above, that
    this completes, its own, and the one below, that begins. These sums are half of the operator's work."""
    done, above, own = (), (), ()
    for j in tl.static_range(COUNT):
        done += (tl.fma(taps[8], s[j + 2], tl.fma(taps[7], s[j + 1], tl.fma(taps[6], s[j], upper[j]))),)
        above += (tl.fma(taps[5], s[j + 2], tl.fma(taps[4], s[j + 1], tl.fma(taps[3], s[j], lower[j]))),)
        own += (tl.fma(taps[2], s[j + 2], tl.fma(taps[1], s[j + 1], tl.fma(taps[0], s[j], bias))),)
    return done, above, own


@jit
def _activate(x, COUNT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """silu(x) of COUNT + 4 pixels, and sigmoid(x) of all but two on each side."""
    s, sigmoids = (), ()
    for j in tl.static_range(COUNT + 4):
        value = x[j].to(WIDE)
        g = sigmoid(value, FAST)
        s += (value * g,)
        if (j >= 2) & (j < COUNT + 2):
            sigmoids += (g,)
    return s, sigmoids


@jit
def _gate(
    dy, a, b, row, rows, column, columns,
    STRIP: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(da, db) of a row of STRIP + 2 pixels; 0 outside, where convolution gives d but the image ends."""
    da, db = (), ()
    here = (row >= 0) & (row < rows)
    for j in tl.static_range(STRIP + 2):
        inside = here
        if (not WHOLE) | (j < 1) | (j > STRIP):
            inside = here & (column + j >= 1) & (column + j <= columns)
        g = sigmoid(b[j], FAST)
        u = b[j] * g
        slope = g + u * (1 - g)
        gradient = dy[j].to(WIDE)
        da += (tl.where(inside, gradient * u, 0),)
        db += (tl.where(inside, gradient * a[j] * slope, 0),)
    return da, db


@jit
def _gradients(x, sigmoids, below, own, above, taps, sums, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """dx of a row, and the sums of dw and dbias with the row added; dd of the three rows has a margin of 1."""
    dx = ()
    for j in tl.static_range(COUNT):
        g = sigmoids[j]
        s = x[j].to(WIDE) * g
        ds = taps[0] * below[j + 2]
        added = (tl.fma(s, below[j + 2], sums[0]),)
        for k in tl.static_range(1, 9):
            dd = (below, own, above)[k // 3][j + 2 - k % 3]
            ds = tl.fma(taps[k], dd, ds)
            added += (tl.fma(s, dd, sums[k]),)
        sums = added + (sums[9] + own[j + 1],)  # noqa: RUF005  (Triton has no unpacking)
        dx += (ds * (g + s * (1 - g)),)
    return dx, sums


@jit
def glu_depthwise_backward_kernel(
    dy, x, weight, bias, dx, partials, samples, span, rows, columns,
    C: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Program (channels, strip, group): `span` samples of dy [B, T, C], x and dx [B, T, 2 C]; partials [groups, strips,
    10, 2 C] get the sums of dw (9) and dbias."""
    channel, mask = channels_of(tl.program_id(0), C, BLOCK)
    column = tl.program_id(1) * STRIP
    first = tl.program_id(2) * span
    taps_a, bias_a = load_taps(weight, bias, channel, mask, WIDE)
    taps_b, bias_b = load_taps(weight, bias, C + channel, mask, WIDE)
    zero = tl.zeros((BLOCK,), WIDE)
    sums_a = (zero,) * 10
    sums_b = (zero,) * 10
    for i in range(0, tl.minimum(span, samples - first)):
        pixel = (first + i + tl.zeros((), tl.int64)) * rows * columns
        source = x + pixel * (2 * C) + channel
        target = dx + pixel * (2 * C) + channel
        upper_a, lower_a = (bias_a,) * (STRIP + 2), (bias_a,) * (STRIP + 2)
        upper_b, lower_b = (bias_b,) * (STRIP + 2), (bias_b,) * (STRIP + 2)
        own_a, above_a = (zero,) * (STRIP + 2), (zero,) * (STRIP + 2)  # dd of rows r - 2 and r - 3
        own_b, above_b = (zero,) * (STRIP + 2), (zero,) * (STRIP + 2)
        g1_a, g2_a, g1_b, g2_b = (zero,) * STRIP, (zero,) * STRIP, (zero,) * STRIP, (zero,) * STRIP
        for r in range(0, rows + 2):
            x_a = load_row(source, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 2)
            x_b = load_row(source + C, r, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 2)
            gradient = load_row(dy + pixel * C + channel, r - 1, rows, column, columns, mask, C, STRIP, WHOLE, 1)
            again_a = load_row(source, r - 2, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 0)
            again_b = load_row(source + C, r - 2, rows, column, columns, mask, 2 * C, STRIP, WHOLE, 0)
            s_a, g0_a = _activate(x_a, STRIP, WIDE, FAST)
            s_b, g0_b = _activate(x_b, STRIP, WIDE, FAST)
            d_a, upper_a, lower_a = convolve(upper_a, lower_a, s_a, taps_a, bias_a, STRIP + 2)
            d_b, upper_b, lower_b = convolve(upper_b, lower_b, s_b, taps_b, bias_b, STRIP + 2)
            below_a, below_b = _gate(gradient, d_a, d_b, r - 1, rows, column, columns, STRIP, WHOLE, WIDE, FAST)
            dx_a, sums_a = _gradients(again_a, g2_a, below_a, own_a, above_a, taps_a, sums_a, STRIP, WIDE)
            dx_b, sums_b = _gradients(again_b, g2_b, below_b, own_b, above_b, taps_b, sums_b, STRIP, WIDE)
            if r >= 2:
                store_row(target, dx_a, r - 2, column, columns, mask, 2 * C, STRIP, WHOLE)
                store_row(target + C, dx_b, r - 2, column, columns, mask, 2 * C, STRIP, WHOLE)
            above_a, own_a, above_b, own_b = own_a, below_a, own_b, below_b
            g2_a, g1_a, g2_b, g1_b = g1_a, g0_a, g1_b, g0_b
    partials += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * (20 * C) + channel
    for k in tl.static_range(10):
        tl.store(partials + k * (2 * C), sums_a[k], mask)
        tl.store(partials + k * (2 * C) + C, sums_b[k], mask)


@jit
def _sums_kernel(
    partials, dweight, dbias, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (channels, k): adds up `count` sums of one of the 9 weights, or of the bias, of BLOCK channels."""
    k = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    total = tl.zeros([PARTS, BLOCK], WIDE)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = (part * 10 + k) * CHANNELS + channel[None, :]
        total += tl.load(partials + at, mask=(part < count) & mask[None, :], other=0)
    if k < 9:
        tl.store(dweight + channel * 9 + k, tl.sum(total, 0), mask)
    else:
        tl.store(dbias + channel, tl.sum(total, 0), mask)


@operator("tbcm::glu_depthwise_backward")
def glu_depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (without one, what its gradient would be)."""
    samples, channels = x.shape[0], x.shape[-1] // 2
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = torch.empty_like(x)
    blocks, strips = -(-channels // BLOCK), -(-columns // strip_of(columns))
    span = max(1, samples * blocks * strips // _PROGRAMS)
    groups = -(-samples // span)
    kind = torch.promote_types(x.dtype, torch.float32)
    partials = torch.empty(groups, strips, 10, 2 * channels, dtype=kind, device=x.device)
    launch(
        glu_depthwise_backward_kernel,
        (blocks, strips, groups),
        *(dy, x, weight, bias, dx, partials, samples, span, rows, columns),
        **constants(x, channels, columns),
        maxnreg=200,  # 10 warps on a multiprocessor; the compiler alone takes a few registers more, which is 9
    )
    dweight, dbias = torch.empty_like(weight), (weight if bias is None else bias).new_empty(2 * channels)
    launch(
        _sums_kernel,
        (-(-2 * channels // 128), 10),
        *(partials, dweight, dbias, groups * strips),
        **{"CHANNELS": 2 * channels, "BLOCK": 128, "PARTS": 16, "WIDE": wide(x.dtype), "num_warps": 4},
    )
    return dx, dweight, dbias
