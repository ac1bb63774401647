"""Layers and operators on dual numbers: a value with its autograd graph and, beside it, a tangent without one.

Forward-mode differentiation written out. Against `torch.func.jvp` it spares the matrix products of a weight's zero
tangent (a third of all of them), keeps no graph for the tangents, and runs inside compiled or sharded modules.
Every function takes and returns `Dual`s and with tangents of None is the plain operator, so one implementation of a
network serves teacher, sampling and training. A tangent has the shape of its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional

Dual = tuple[Tensor, Tensor | None]
"""A value and its tangent (None: the tangent is not wanted)."""

Rule = Callable[[Any, Tensor, Tensor], Tensor]
"""(layer, x, dx) -> dy, run without gradients."""

_RULES: dict[type[nn.Module], Rule] = {}


def tangent_rule(*layers: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Declares how layers of exactly these types push a tangent forward."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(layers, rule))
        return rule

    return register


def dual(layer: nn.Module, x: Dual) -> Dual:
    """`layer` of a dual number. Raises TypeError where no rule is known for the layer's type."""
    value, tangent = x
    y = layer(value)
    if tangent is None:
        return y, None
    rule = _RULES.get(type(layer))
    if rule is None:
        raise TypeError(
            f"no tangent rule for a layer of type {type(layer).__name__}: declare one with @tangent_rule, or let"
            " torch.func.jvp differentiate the network (student.derivative=jvp)"
        )
    with torch.no_grad():
        return y, rule(layer, value, tangent)


def pointwise(conv: nn.Module, x: Dual) -> Dual:
    """A 1 x 1 convolution of channels-last samples [B, T, C]: the matrix product that it is."""
    value, tangent = x
    if type(conv) is not nn.Conv2d and tangent is None:  # a frozen network's fp8 layer
        return conv(value.mT[..., None])[..., 0].mT, None
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.groups != 1:
        raise TypeError(f"no tangent rule for a 1 x 1 convolution of type {type(conv).__name__}: {conv}")
    y = functional.linear(value, conv.weight.flatten(1), conv.bias)
    if tangent is None:
        return y, None
    with torch.no_grad():
        return y, functional.linear(tangent, conv.weight.flatten(1))


@tangent_rule(nn.Linear)
def _linear(layer: nn.Linear, x: Tensor, dx: Tensor) -> Tensor:
    return functional.linear(dx, layer.weight)


@tangent_rule(nn.Conv2d)
def _convolution(layer: nn.Conv2d, x: Tensor, dx: Tensor) -> Tensor:
    return layer._conv_forward(dx, layer.weight, None)


@tangent_rule(nn.SiLU)
def _silu(layer: nn.SiLU, x: Tensor, dx: Tensor) -> Tensor:
    return _silu_slope(x) * dx


@tangent_rule(nn.Dropout)
def _dropout(layer: nn.Dropout, x: Tensor, dx: Tensor) -> Tensor:
    if layer.training and layer.p:
        raise ValueError(f"dropout of {layer.p} in a network that is differentiated: its mask would differ")
    return dx


@tangent_rule(nn.LayerNorm)
def _layer_norm(layer: nn.LayerNorm, x: Tensor, dx: Tensor) -> Tensor:
    """n = (x - mean) / std: dn = (dx - mean dx - n mean(n dx)) / std."""
    x, dx = _wide(x), _wide(dx)
    axes = tuple(range(-len(layer.normalized_shape), 0))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + layer.eps)
    n, dx = (x - mean) * scale, dx - dx.mean(axes, keepdim=True)
    dn = scale * (dx - n * (n * dx).mean(axes, keepdim=True))
    return dn if layer.weight is None else dn * layer.weight


@tangent_rule(RMSNorm)
def _rms_norm(layer: RMSNorm, x: Tensor, dx: Tensor) -> Tensor:
    """n = x / rms: dn = (dx - n mean(n dx)) / rms."""
    x, dx = _wide(x), _wide(dx)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps)
    n = x * scale
    dn = scale * (dx - n * (n * dx).mean(-1, keepdim=True))
    return dn if layer.weight is None else dn * layer.weight


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift: x [B, T, D], shift and scale [B, 1, D]."""
    y = x[0] * (1 + scale[0]) + shift[0]
    if x[1] is None or shift[1] is None or scale[1] is None:
        return y, None
    with torch.no_grad():
        return y, x[1] * (1 + scale[0]) + x[0] * scale[1] + shift[1]


def gated_residual(h: Dual, gate: Dual, x: Dual) -> Dual:
    """h + gate x: h and x [B, T, D], gate [B, 1, D]."""
    y = h[0] + gate[0] * x[0]
    if h[1] is None or gate[1] is None or x[1] is None:
        return y, None
    with torch.no_grad():
        return y, h[1] + gate[1] * x[0] + gate[0] * x[1]


def add(a: Dual, b: Dual) -> Dual:
    """a + b."""
    y = a[0] + b[0]
    return y, None if a[1] is None or b[1] is None else a[1] + b[1]


def glu(x: Dual, dim: int) -> Dual:
    """The gated linear unit of Sana's Mix-FFN: a silu(b), a and b the halves of x along `dim`."""
    a, b = x[0].chunk(2, dim)
    y = a * functional.silu(b)
    if x[1] is None:
        return y, None
    with torch.no_grad():
        da, db = x[1].chunk(2, dim)
        return y, da * functional.silu(b) + a * (_silu_slope(b) * db)


def linear_attention(query: Dual, key: Dual, value: Dual, heads: int) -> Dual:
    """Sana's ReLU linear attention over tokens, [B, T, D] each: relu(q) S / (relu(q) s), S = sum_k relu(k) v^T and
    s = sum_k relu(k), per head.

    Sums and quotient are in fp32 whatever autocast says: in fp16 the guard of the denominator, 1e-15, would be 0, and a
    query whose ReLU is all zero would become NaN. fp32 comes out.
    """
    with torch.autocast(query[0].device.type, enabled=False):
        q, k = (functional.relu(_heads(_wide(x[0]), heads)) for x in (query, key))
        v = functional.pad(_heads(_wide(value[0]), heads), (0, 1), value=1.0)  # the last column sums the weights
        state = k.mT @ v
        sums = q @ state
        divisor = sums[..., -1:] + 1e-15
        out = sums[..., :-1] / divisor
        tokens = _tokens(out)
        if query[1] is None or key[1] is None or value[1] is None:
            return tokens, None
        with torch.no_grad():
            dq, dk = (_heads(_wide(dx), heads) * (x > 0) for dx, x in ((query[1], q), (key[1], k)))
            dv = functional.pad(_heads(_wide(value[1]), heads), (0, 1))
            dsums = dq @ state + q @ (dk.mT @ v + k.mT @ dv)
            dout = (dsums[..., :-1] - out * dsums[..., -1:]) / divisor
            return tokens, _tokens(dout)


def cross_attention(query: Dual, key: Tensor, value: Tensor, bias: Tensor, heads: int, *, explicit: bool) -> Dual:
    """Softmax attention of prompt-major samples to their prompt's text, whose tangent is zero.

    query [P n, T, D], key and value [P, L, D], bias [P, 1, L] added to the scores. The n samples of a prompt attend
    together, as one sequence of n T queries. `explicit` spells the softmax out, which a tangent needs: PyTorch's fused
    attention has none.
    """
    prompts = key.shape[0]
    q, k, v = (_heads(x.reshape(prompts, -1, x.shape[-1]), heads) for x in (query[0], key, value))
    if query[1] is None and not explicit:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None].to(q.dtype))
        return _tokens(out).reshape(query[0].shape), None
    scale = q.shape[-1] ** -0.5
    weights = (q * scale @ k.mT + bias[:, None]).softmax(-1).to(v.dtype)
    out = _tokens(weights @ v).reshape(query[0].shape)
    if query[1] is None:
        return out, None
    with torch.no_grad():
        dq = _heads(query[1].reshape(prompts, -1, query[1].shape[-1]), heads)
        dscores = dq * scale @ k.mT
        mean = (weights * dscores).sum(-1, keepdim=True)
        dout = (weights * (dscores - mean)).to(v.dtype) @ v
        return out, _tokens(dout).reshape(query[0].shape)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads d]."""
    return x.transpose(1, 2).flatten(-2)
