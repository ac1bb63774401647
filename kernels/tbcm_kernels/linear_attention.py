"""Sana's self-attention core, plain and dual: RMSNorm of queries and keys over the whole width, ReLU, linear attention.

With the scale r = 1 / rms(k) of each key token, a norm's weights w, and per head u = relu(w_q q), a = relu(w_k k) r:

    S = sum_k a v^T,   z = sum_k a,   out = u S / (u z + guard)

and for tangents dr = -r^3 mean(k dk), da = [a > 0] w_k (r dk + dr k), du = [u > 0] w_q dq:

    dS = sum_k da v^T + a dv^T,   dz = sum_k da,   dout = (du S + u dS - out (du z + u dz)) / (u z + guard)

A query's own scale cancels: it multiplies numerator and divisor alike, and its tangent moves a query along itself. It
matters to the guard alone, which is 1e-15 behind a norm and therefore 1e-15 rms(q) here. The rms is that of the head's
channels, not of all: it tells where u z is 1e-15 of q's size, that is of nothing. So queries are read once.

Three kernels: r and dr; S and z of chunks of tokens, which PyTorch adds; out. Of n = B T D numbers the plain operator
reads k twice, q and v once, and writes out: 5 n; the dual 10 n (and 9 n backward), against 4 n and 8 n (and 7 n) at
least. S and z are fp32. Of half-precision tensors, products are of tf32 numbers, rounded to the nearest: q, k and v are
such numbers (their weights' signs go through the ReLU, the weights' sizes are S's), S is taken in two parts, and a and
da alone are rounded, in S and z alike: out is that of keys which differ by 2^-12. Saved for backward: the inputs, r, S
and z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbcm_kernels import dispatch
from tbcm_kernels.catalog import Cost, Dual, Operator, Size, nbytes
from tbcm_kernels.launch import operator
from tbcm_kernels.linear_attention_backward import linear_attention_backward
from tbcm_kernels.linear_attention_forward import forward

SMALLEST_HEAD, LARGEST_HEAD = 16, 64
"""Columns. A tensor core's least; of 128 the states, in two parts each, are more than shared memory holds."""


def linear_attention(
    qkv: Dual,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> Dual:
    """ReLU linear attention over tokens, of normalised queries and keys: these and values side by side [B, T, 3 D], as
    one projection leaves them.

    `norm_q`, `norm_k` [D]: weights of RMSNorms over D, with `eps` added to the mean square (None: no norm). The result
    [B, T, D] is computed in fp32 and stored as `dtype`; it has a tangent where qkv has one.
    """
    value, tangent = qkv
    unsupported = _unsupported(value, norm_q, eps, heads)
    if not dispatch.fused("linear_attention", value, tangent, norm_q, norm_k, unsupported=unsupported):
        return reference(qkv, norm_q, norm_k, eps, heads, dtype)
    if tangent is None:
        return _plain(value, norm_q, norm_k, eps, heads, dtype)[0], None
    out, dout, _, _ = _dual(value, tangent.detach().to(value.dtype), norm_q, norm_k, eps, heads, dtype)
    return out, dout


def _unsupported(qkv: Tensor, norm_q: Tensor | None, eps: float, heads: int) -> str | None:
    dim = qkv.shape[-1] // 3 // heads
    if not SMALLEST_HEAD <= dim <= LARGEST_HEAD:
        return f"heads of {dim} columns, not {SMALLEST_HEAD} to {LARGEST_HEAD}"
    if norm_q is not None and eps <= 0:
        return f"a norm with eps of {eps}"
    return None


def reference(
    qkv: Dual,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> Dual:
    """`linear_attention` in plain PyTorch, in fp32 whatever autocast says: in fp16 the divisor's guard, 1e-15, would be
    0, and a query whose ReLU is all zero would become NaN."""
    query, key, value = qkv[0].chunk(3, -1)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (
            functional.relu(_heads(_normalised(_wide(x), norm, eps), heads))
            for x, norm in ((query, norm_q), (key, norm_k))
        )
        v = functional.pad(_heads(_wide(value), heads), (0, 1), value=1.0)  # the last column sums the weights
        state = k.mT @ v
        sums = q @ state
        divisor = sums[..., -1:] + 1e-15
        out = sums[..., :-1] / divisor
        tokens = _tokens(out).to(dtype)
        if qkv[1] is None:
            return tokens, None
        with torch.no_grad():
            dquery, dkey, dvalue = qkv[1].chunk(3, -1)
            dq = _heads(_normalised_tangent(query, dquery, norm_q, eps), heads) * (q > 0)
            dk = _heads(_normalised_tangent(key, dkey, norm_k, eps), heads) * (k > 0)
            dv = functional.pad(_heads(_wide(dvalue), heads), (0, 1))
            dsums = dq @ state + q @ (dk.mT @ v + k.mT @ dv)
            dout = (dsums[..., :-1] - out * dsums[..., -1:]) / divisor
            return tokens, _tokens(dout).to(dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _normalised_tangent(x: Tensor, dx: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """n = x / rms: dn = (dx - n mean(n dx)) / rms."""
    x, dx = _wide(x), _wide(dx)
    if weight is None:
        return dx
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = x * scale
    return scale * (dx - n * (n * dx).mean(-1, keepdim=True)) * weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads d]."""
    return x.transpose(1, 2).flatten(-2)


@operator("tbcm::linear_attention")
def _plain(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, eps: float, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, scale, state = forward(qkv, None, norm_q, norm_k, eps, heads, dtype)
    return out, scale, state


@operator("tbcm::linear_attention_dual")
def _dual(
    qkv: Tensor,
    tangent: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, dout, scale, state = forward(qkv, tangent, norm_q, norm_k, eps, heads, dtype)
    assert dout is not None
    return out, dout, scale, state


def _save_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, norm_q, norm_k, ctx.eps, ctx.heads, _ = inputs
    _, scale, state = output
    ctx.mark_non_differentiable(scale, state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, norm_q, norm_k, scale, state)


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, _, *others = inputs
    out, dout, scale, state = output
    _save_plain(ctx, (qkv, *others), (out, scale, state))
    ctx.mark_non_differentiable(dout, scale, state)


def _plain_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 6
    gradients = iter(linear_attention_backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.heads))
    return *(None if x is None else next(gradients) for x in ctx.saved_tensors[:3]), None, None, None


def _dual_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    of_qkv, *others = _plain_backward(ctx, gradient)
    return of_qkv, None, *others


_plain.register_autograd(_plain_backward, setup_context=_save_plain)
_dual.register_autograd(_dual_backward, setup_context=_save_dual)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    def normal() -> Tensor:
        return torch.randn(size.samples, size.tokens, 3 * size.dim, device=device, dtype=dtype)

    qkv = normal().requires_grad_(), normal() if tangents else None
    norm_q, norm_k = (torch.rand(size.dim, device=device).add_(0.5).requires_grad_() for _ in range(2))
    return qkv, norm_q, norm_k, 1e-5, size.heads, dtype


def cost(qkv: Dual, *others: Any) -> Cost:
    """Two products, with the state's d columns and the weights' sum; of tangents, two more each."""
    norm_q, norm_k, _, heads, dtype = others
    duals = 1 if qkv[1] is None else 2
    outs = duals * qkv[0].numel() // 3 * dtype.itemsize
    products = 2 if duals == 1 else 6
    return Cost(products * _product(qkv[0], heads), nbytes(*qkv, norm_q, norm_k) + outs)


def backward_cost(qkv: Dual, *others: Any) -> Cost:
    """Five products: out again, and the gradients of queries, keys, values and the state. The tangent has none."""
    norm_q, norm_k, _, heads, dtype = others
    gradient = qkv[0].numel() // 3 * dtype.itemsize
    return Cost(5 * _product(qkv[0], heads), 2 * nbytes(qkv[0], norm_q, norm_k) + gradient)


def _product(qkv: Tensor, heads: int) -> int:
    """Operations of a product of all tokens with the state and the sum of weights."""
    numbers = qkv.numel() // 3
    return 2 * numbers * (qkv.shape[-1] // 3 // heads + 1)


OPERATOR = Operator(
    "linear_attention", run=linear_attention, reference=reference, inputs=inputs, cost=cost, backward_cost=backward_cost
)
