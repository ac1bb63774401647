"""Softmax attention with a tangent: any softmax attention of any network, for forward-mode differentiation.

With s = scale q k^T + bias, p = softmax(s) and out = p v, the tangents of q, k, v give

    ds = scale (dq k^T + q dk^T),   dout = (p (ds - mean)) v + p dv,   mean = sum p ds

The arithmetic goes over blocks of queries, so that a block's scores are all that is held at a time, forward and
backward: what is kept for backward is q, k, v and the bias, linear in length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.catalog import Dual

_BLOCK = 512
"""Queries whose scores are held at once."""


def attention(query: Dual, key: Dual, value: Dual, bias: Tensor | None, scale: float) -> Dual:
    """softmax(scale q k^T + bias) v of [B, heads, T, d] queries, [B, heads, L, d] keys and [B, heads, L, e] values.

    `bias` broadcasts to [B, heads, T, L]; it is finite, and has no gradient and no tangent. A tangent of None is zero;
    where all are None the result has none. The tangent carries no graph, and backward is for the value alone.
    """
    if all(d is None for _, d in (query, key, value)):
        raise ValueError("attention without a tangent is torch's scaled_dot_product_attention")
    (q, dq), (k, dk), (v, dv) = ((x, torch.zeros_like(x) if d is None else d) for x, d in (query, key, value))
    return _attention(q, dq, k, dk, v, dv, bias, scale)


@torch.library.custom_op("tbcm::attention", mutates_args=())
def _attention(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    tangent = torch.empty_like(out)
    for rows in _blocks(q):
        p = _weights(q[..., rows, :], k, _of(bias, rows), scale)
        ds = ((dq[..., rows, :] @ k.mT) + (q[..., rows, :] @ dk.mT)).to(p.dtype) * scale
        dp = p * (ds - (p * ds).sum(-1, keepdim=True))
        out[..., rows, :] = p.to(v.dtype) @ v
        tangent[..., rows, :] = dp.to(v.dtype) @ v + p.to(v.dtype) @ dv
    return out, tangent


@_attention.register_fake
def _(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    shape = *q.shape[:-1], v.shape[-1]
    return q.new_empty(shape), q.new_empty(shape)


@torch.library.custom_op("tbcm::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With dp = grad v^T and ds = p (dp - sum p dp): ds k, ds^T q and p^T grad."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows in _blocks(q):
        p = _weights(q[..., rows, :], k, _of(bias, rows), scale)
        dp = (grad[..., rows, :] @ v.mT).to(wide)
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
        grad_q[..., rows, :] = ds @ k
        grad_k += ds.mT @ q[..., rows, :]
        grad_v += p.to(v.dtype).mT @ grad[..., rows, :]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, _, k, _, v, _, bias, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    q, k, v, bias = ctx.saved_tensors
    grad_q, grad_k, grad_v = _attention_backward(grad, q, k, v, bias, ctx.scale)
    return grad_q, None, grad_k, None, grad_v, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return (scores if bias is None else scores + bias).softmax(-1)


def _blocks(q: Tensor) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, q.shape[-2], _BLOCK)]


def _of(bias: Tensor | None, rows: slice) -> Tensor | None:
    """The bias of these queries, where it tells queries apart."""
    return bias if bias is None or bias.dim() < 2 or bias.shape[-2] == 1 else bias[..., rows, :]
