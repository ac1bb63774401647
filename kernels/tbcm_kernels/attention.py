"""Softmax attention with a tangent: any softmax attention of any network, for forward-mode differentiation.

With s = scale q k^T + bias, p = softmax(s) and out = p v, the tangents of q, k, v give

    ds = scale (dq k^T + q dk^T),   dout = (p (ds - mean)) v + p dv,   mean = sum p ds

The kernels are in `attention_forward.py` and `attention_backward.py`. For what they do not do, PyTorch's operators go
over blocks of queries, so that a block's scores are all that is held at a time. Either way memory is linear in length,
forward and backward.

A value of the kernel is the same in all bits with and without a tangent. That of a network is not: where nothing has a
tangent, networks take torch's own attention, which is faster, and rounds in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbcm_kernels import dispatch
from tbcm_kernels.attention_forward import fused_attention
from tbcm_kernels.attention_tiles import unsupported
from tbcm_kernels.catalog import JOINT, Cost, Dual, Operator, Size, nbytes

_BLOCK = 512
"""Queries whose scores are held at once."""


def attention(query: Dual, key: Dual, value: Dual, bias: Tensor | None, scale: float) -> Dual:
    """softmax(scale q k^T + bias) v of [B, heads, T, d] queries, [B, heads, L, d] keys and [B, heads, L, e] values.

    `bias` broadcasts to [B, heads, T, L]; it is finite, and has no gradient and no tangent. A tangent of None is zero;
    where all are None the result has none. The tangent carries no graph, and backward is for the value alone. Under
    autocast all are cast, as for torch's own attention.
    """
    (q, dq), (k, dk), (v, dv) = query, key, value = tuple(_cast(x) for x in (query, key, value))
    if not dispatch.fused("attention", q, dq, k, dk, v, dv, bias, unsupported=unsupported(q, k, v), in_jvp=True):
        return reference(query, key, value, bias, scale)
    out, tangent, _ = fused_attention(q, _of_queries(query, key, value), k, dk, v, dv, bias, scale)
    return out, tangent if tangent.shape == out.shape else None


def reference(query: Dual, key: Dual, value: Dual, bias: Tensor | None, scale: float) -> Dual:
    """`attention` in PyTorch's operators. Its fused attention, which has no tangent, where nothing asks for one."""
    dq = _of_queries(query, key, value)
    if dq is None:
        q, k, v = query[0], key[0], value[0]
        mask = None if bias is None else bias.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    return _attention(query[0], dq, *key, *value, bias, scale)


def _of_queries(query: Dual, key: Dual, value: Dual) -> Tensor | None:
    """The queries' tangent: zeros where it is not given and another is."""
    if query[1] is None and (key[1] is not None or value[1] is not None):
        return torch.zeros_like(query[0])
    return query[1]


def _cast(x: Dual) -> Dual:
    """As autocast casts; the tangent, whose gradient nobody asks for, without its graph."""
    value, tangent = x
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
    return value, None if tangent is None else tangent.detach().to(value.dtype)


@torch.library.custom_op("tbcm::attention", mutates_args=())
def _attention(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    tangent = torch.empty_like(out)
    for rows in _blocks(q):
        p = _weights(q[..., rows, :], k, _of(bias, rows), scale)
        ds = dq[..., rows, :] @ k.mT
        if dk is not None:
            ds = ds + q[..., rows, :] @ dk.mT
        ds = ds.to(p.dtype) * scale
        dp = p * (ds - (p * ds).sum(-1, keepdim=True))
        out[..., rows, :] = p.to(v.dtype) @ v
        dout = dp.to(v.dtype) @ v
        tangent[..., rows, :] = dout if dv is None else dout + p.to(v.dtype) @ dv
    return out, tangent


@_attention.register_fake
def _(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, bias: Tensor | None, scale: float
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


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """Of the image's tokens, heads apart as a projection leaves them."""

    def normal() -> Tensor:
        shape = size.samples, size.tokens, size.heads, size.dim // size.heads
        return torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)

    duals = [(normal().requires_grad_(), normal() if tangents else None) for _ in range(3)]
    return *duals, None, (size.dim // size.heads) ** -0.5


def cost(query: Dual, key: Dual, value: Dual, bias: Tensor | None, scale: float) -> Cost:
    """Two products of queries and keys or values; each has two more of a tangent of both factors, or one of one's."""
    tangents = [x[1] for x in (query, key, value)]
    duals = 2 if any(x is not None for x in tangents) else 1
    scores, values = (duals + (x is not None) for x in tangents[1:])
    pairs = 2 * query[0].shape[:-1].numel() * key[0].shape[-2]
    flops = pairs * (scores * key[0].shape[-1] + values * value[0].shape[-1])
    outs = duals * query[0].shape[:-1].numel() * value[0].shape[-1] * value[0].element_size()
    return Cost(flops, nbytes(*query, *key, *value, bias) + outs)


def backward_cost(query: Dual, key: Dual, value: Dual, bias: Tensor | None, scale: float) -> Cost:
    """Five products: scores, and the gradients of weights, query, key and value. The tangent has none."""
    (q, _), (k, _), (v, _) = query, key, value
    flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])
    outs = 2 * q.shape[:-1].numel() * v.shape[-1] * v.element_size()  # the result and its gradient
    return Cost(flops, 2 * nbytes(q, k, v) + nbytes(bias) + outs)


OPERATOR = Operator("attention", attention, reference, inputs, cost, backward_cost, models=JOINT)
