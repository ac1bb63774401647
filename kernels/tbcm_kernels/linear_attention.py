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
    query: Dual,
    key: Dual,
    value: Dual,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> Dual:
    """ReLU linear attention over tokens, [B, T, D] each, of normalised queries and keys.

    `norm_q`, `norm_k` [D]: weights of RMSNorms over D, with `eps` added to the mean square (None: no norm). The result
    [B, T, D] is computed in fp32 and stored as `dtype`; it has a tangent where all three have one.
    """
    (q, dq), (k, dk), (v, dv) = query, key, value
    unsupported = _unsupported(q, k, v, norm_q, eps, heads)
    if not dispatch.fused("linear_attention", q, k, v, dq, dk, dv, norm_q, norm_k, unsupported=unsupported):
        return reference(query, key, value, norm_q, norm_k, eps, heads, dtype)
    if dq is None or dk is None or dv is None:
        return _plain(q, k, v, norm_q, norm_k, eps, heads, dtype)[0], None
    tangents = dq.detach().to(q.dtype), dk.detach().to(k.dtype), dv.detach().to(v.dtype)
    out, tangent, _, _ = _dual(q, k, v, *tangents, norm_q, norm_k, eps, heads, dtype)
    return out, tangent


def _unsupported(q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, eps: float, heads: int) -> str | None:
    dim = q.shape[-1] // heads
    if not SMALLEST_HEAD <= dim <= LARGEST_HEAD:
        return f"heads of {dim} columns, not {SMALLEST_HEAD} to {LARGEST_HEAD}"
    if not q.shape == k.shape == v.shape or q.dim() != 3:
        return f"queries {list(q.shape)} with keys {list(k.shape)} and values {list(v.shape)}"
    if norm_q is not None and eps <= 0:
        return f"a norm with eps of {eps}"
    return None


def reference(
    query: Dual,
    key: Dual,
    value: Dual,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> Dual:
    """`linear_attention` in plain PyTorch, in fp32 whatever autocast says: in fp16 the divisor's guard, 1e-15, would be
    0, and a query whose ReLU is all zero would become NaN."""
    with torch.autocast(query[0].device.type, enabled=False):
        q, k = (
            functional.relu(_heads(_normalised(_wide(x[0]), norm, eps), heads))
            for x, norm in ((query, norm_q), (key, norm_k))
        )
        v = functional.pad(_heads(_wide(value[0]), heads), (0, 1), value=1.0)  # the last column sums the weights
        state = k.mT @ v
        sums = q @ state
        divisor = sums[..., -1:] + 1e-15
        out = sums[..., :-1] / divisor
        tokens = _tokens(out).to(dtype)
        if query[1] is None or key[1] is None or value[1] is None:
            return tokens, None
        with torch.no_grad():
            dq = _heads(_normalised_tangent(query[0], query[1], norm_q, eps), heads) * (q > 0)
            dk = _heads(_normalised_tangent(key[0], key[1], norm_k, eps), heads) * (k > 0)
            dv = functional.pad(_heads(_wide(value[1]), heads), (0, 1))
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, scale, state = forward((query, key, value), None, norm_q, norm_k, eps, heads, dtype)
    return out, scale, state


@operator("tbcm::linear_attention_dual")
def _dual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tangents = dquery, dkey, dvalue
    out, dout, scale, state = forward((query, key, value), tangents, norm_q, norm_k, eps, heads, dtype)
    assert dout is not None
    return out, dout, scale, state


def _save_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.heads, _ = inputs
    _, scale, state = output
    ctx.mark_non_differentiable(scale, state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, scale, state)


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, dout, scale, state = output
    _save_plain(ctx, (*inputs[:3], *inputs[6:]), (out, scale, state))
    ctx.mark_non_differentiable(dout, scale, state)


def _plain_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 8
    gradients = iter(linear_attention_backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.heads))
    return *(None if x is None else next(gradients) for x in ctx.saved_tensors[:5]), None, None, None


def _dual_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients = _plain_backward(ctx, gradient)
    return *gradients[:3], None, None, None, *gradients[3:]


_plain.register_autograd(_plain_backward, setup_context=_save_plain)
_dual.register_autograd(_dual_backward, setup_context=_save_dual)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    def normal() -> Tensor:
        return torch.randn(size.samples, size.tokens, size.dim, device=device, dtype=dtype)

    query, key, value = ((normal().requires_grad_(), normal() if tangents else None) for _ in range(3))
    norm_q, norm_k = (torch.rand(size.dim, device=device).add_(0.5).requires_grad_() for _ in range(2))
    return query, key, value, norm_q, norm_k, 1e-5, size.heads, dtype


def cost(query: Dual, key: Dual, value: Dual, *others: Any) -> Cost:
    """Two products, with the state's d columns and the weights' sum; of tangents, two more each."""
    norm_q, norm_k, _, heads, dtype = others
    duals = 1 if query[1] is None else 2
    outs = duals * query[0].numel() * dtype.itemsize
    products = 2 if duals == 1 else 6
    return Cost(products * _product(query[0], heads), nbytes(*query, *key, *value, norm_q, norm_k) + outs)


def backward_cost(query: Dual, key: Dual, value: Dual, *others: Any) -> Cost:
    """Five products: out again, and the gradients of queries, keys, values and the state. The tangent has none."""
    norm_q, norm_k, _, heads, dtype = others
    gradient = query[0].numel() * dtype.itemsize
    return Cost(5 * _product(query[0], heads), 2 * nbytes(query[0], key[0], value[0], norm_q, norm_k) + gradient)


def _product(query: Tensor, heads: int) -> int:
    """Operations of a product of all tokens with the state and the sum of weights."""
    return 2 * query.numel() * (query.shape[-1] // heads + 1)


OPERATOR = Operator(
    "linear_attention", run=linear_attention, reference=reference, inputs=inputs, cost=cost, backward_cost=backward_cost
)
