"""Layers on dual numbers: a value with its autograd graph and, beside it, a tangent without one.

Forward-mode differentiation written out. Against `torch.func.jvp` it spares the matrix products of a weight's zero
tangent (a third of all of them), keeps no graph for the tangents, and runs inside compiled or sharded modules.
Every function takes and returns `Dual`s and with tangents of None is the plain layer, so one implementation of a
network serves teacher, sampling and training. The operators between the layers are those of `tbcm_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from tbcm_kernels.catalog import Dual
from torch import Tensor, nn
from torch.nn import functional

Rule = Callable[[Any, Tensor, Tensor], Tensor]
"""(layer, x, dx) -> dy, run without gradients."""

_RULES: dict[type[nn.Module], Rule] = {}

DualLayer = Callable[[Any, Dual], Dual]
_LAYERS: dict[type[nn.Module], DualLayer] = {}
_POINTWISE: dict[type[nn.Module], DualLayer] = {}


def dual_rule(*layers: type[nn.Module]) -> Callable[[DualLayer], DualLayer]:
    """Declares what `dual` makes of layers of exactly these types that are made of others."""
    return _into(_LAYERS, layers)


def pointwise_rule(*layers: type[nn.Module]) -> Callable[[DualLayer], DualLayer]:
    """The same for `pointwise`."""
    return _into(_POINTWISE, layers)


def _into(rules: dict[type[nn.Module], DualLayer], layers: tuple[type[nn.Module], ...]) -> Any:
    def register(rule: DualLayer) -> DualLayer:
        rules.update(dict.fromkeys(layers, rule))
        return rule

    return register


def tangent_rule(*layers: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Declares how layers of exactly these types push a tangent forward."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(layers, rule))
        return rule

    return register


def dual(layer: nn.Module, x: Dual) -> Dual:
    """`layer` of a dual number. Raises TypeError where no rule is known for the layer's type."""
    if whole := _LAYERS.get(type(layer)):
        return whole(layer, x)
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


def side_by_side(layers: Sequence[nn.Module], x: Dual) -> Dual:
    """The results of linear layers of one x, [..., N1 + N2 + ...]: of plain layers in one product, of others joined."""
    plain: list[Any] = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is None]
    if len(plain) < len(layers):
        values, tangents = zip(*(dual(layer, x) for layer in layers), strict=True)
        return torch.cat(values, -1), None if x[1] is None else torch.cat(tangents, -1)
    weight = torch.cat([layer.weight for layer in plain])
    y = functional.linear(x[0], weight)
    if x[1] is None:
        return y, None
    with torch.no_grad():
        return y, functional.linear(x[1], weight)


def cast(x: Dual, dtype: torch.dtype) -> Dual:
    return x[0].to(dtype), None if x[1] is None else x[1].to(dtype)


def activations_dtype(x: Tensor) -> torch.dtype:
    """What the next linear layer takes in: autocast's dtype, or that of the residual stream `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def pointwise(conv: nn.Module, x: Dual) -> Dual:
    """A 1 x 1 convolution of channels-last samples [B, T, C]: the matrix product that it is."""
    if whole := _POINTWISE.get(type(conv)):
        return whole(conv, x)
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


@tangent_rule(nn.SiLU)
def _silu(layer: nn.SiLU, x: Tensor, dx: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)) * dx


@tangent_rule(nn.Dropout)
def _dropout(layer: nn.Dropout, x: Tensor, dx: Tensor) -> Tensor:
    if layer.training and layer.p:
        raise ValueError(f"dropout of {layer.p} in a network that is differentiated: its mask would differ")
    return dx


@tangent_rule(RMSNorm)
def _rms_norm(layer: RMSNorm, x: Tensor, dx: Tensor) -> Tensor:
    """n = x / rms: dn = (dx - n mean(n dx)) / rms."""
    x, dx = _wide(x), _wide(dx)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps)
    n = x * scale
    dn = scale * (dx - n * (n * dx).mean(-1, keepdim=True))
    return dn if layer.weight is None else dn * layer.weight


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
