"""Operations that `torch.func.jvp` cannot differentiate, or that lose the time's precision, replaced in any network.

A network calls torch's functions; a mode sees each call, whatever class makes it. So nothing has to be known of a
network's attention processors, and none of its code is changed.

    attention      fused kernels have no forward-mode derivative: the dual operator of `tbcm_kernels` instead
    group norm     torch's takes views of tangents whose strides a convolution chooses: fails for channels-last input
    layer norm     torch's cannot be compiled under a jvp
    unflatten      torch.compile cannot trace its Python body under any mode
    casts of time  FLUX, Chroma, Qwen-Image and Flux2 round the time to half precision before they embed it, which tells
                   apart 4 of 64 times between 0.90 and 0.91: a consistency model's derivative in t is lost
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from tbcm_kernels.attention import attention as dual_attention
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = torch.float16, torch.bfloat16


class ExactTime(TorchFunctionMode):
    """A one-dimensional fp32 tensor is a time, and stays fp32 until it has been embedded. To be the innermost mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.to, Tensor.type_as) and _is_time(args[0]) and _to_half(args, kwargs):
            return args[0]
        if func is Tensor.unflatten:
            return _unflatten(*args, **kwargs)
        if func is functional.linear and args[0].dtype == torch.float32 and args[1].dtype in _HALF:
            args = (args[0].to(args[1].dtype), *args[1:])  # a layer that took its dtype from the time's
        return func(*args, **kwargs)


class Differentiable(TorchFunctionMode):
    """Inside, any diffusers network has a derivative under `torch.func.jvp`, with and without a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of dual numbers."""
    if dropout_p:
        raise ValueError("a network with dropout in its attention cannot be differentiated: its mask would differ")
    q, k, v = query, key, value
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    duals = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    if all(dual.tangent is None for dual in duals):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    bias, sees = _bias(attn_mask, q.dtype)
    q_dual, k_dual, v_dual = ((dual.primal, dual.tangent) for dual in duals)
    y, dy = dual_attention(q_dual, k_dual, v_dual, bias, scale)
    out = forward_ad.make_dual(y, dy)
    return out if sees is None else out * sees


def _bias(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A mask as a finite bias, and which queries see anything at all (None: all do).

    Finite, since a query without keys (padding in Chroma) would be NaN; it gets zeros, as from torch's own kernels.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask, None
    wide = torch.promote_types(dtype, torch.float32)
    lowest = torch.full((), torch.finfo(wide).min, dtype=wide, device=mask.device)
    return torch.where(mask, torch.zeros_like(lowest), lowest), mask.any(-1, keepdim=True).to(dtype)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    x = _standardised(_wide(input.reshape(input.shape[0], num_groups, -1)), (-1,), eps).reshape(input.shape)
    shape = (1, -1) + (1,) * (input.ndim - 2)
    x = x if weight is None else x * weight.reshape(shape)
    x = x if bias is None else x + bias.reshape(shape)
    return _as_autocast(x, input)


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    x = _standardised(_wide(input), tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return _as_autocast(x, input)


def _unflatten(x: Tensor, dim: int, sizes: Any) -> Tensor:
    dim = dim % x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in _HALF else x


def _as_autocast(x: Tensor, input: Tensor) -> Tensor:
    """Under autocast norms give fp32."""
    return x if torch.is_autocast_enabled(input.device.type) else x.to(input.dtype)


def _is_time(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 1 and x.dtype == torch.float32


def _to_half(args: Any, kwargs: Any) -> bool:
    given = [kwargs.get("dtype"), kwargs.get("other"), *args[1:]]
    return any((x.dtype if isinstance(x, Tensor) else x) in _HALF for x in given if isinstance(x, Tensor | torch.dtype))


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    functional.scaled_dot_product_attention: attention,
    functional.group_norm: group_norm,
    functional.layer_norm: layer_norm,
}
