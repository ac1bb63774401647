"""Attention of frozen networks by flash-attn (Dao 2023), where that package is installed and can take it.

A mode, as in `tbcm.models.differentiation.explicit`: nothing has to be known of a network's attention processors. What
flash-attn cannot take (masks, wide heads, fp32) stays with torch's own kernels. A student under differentiation never
comes here: its attention is the dual operator of `tbcm_kernels`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tbcm.errors import first_line

logger = logging.getLogger(__name__)

WIDEST = 256
"""Numbers in a head."""
_HALF = torch.float16, torch.bfloat16


@cache
def installed() -> Callable[..., Tensor] | None:
    """flash-attn's function of [B, T, heads, D]; None, with a warning where it is there and does not load."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # built for another torch or CUDA, in one of many ways
        logger.warning("flash-attn is installed and does not load: %s", first_line(error))
        return None
    function: Callable[..., Tensor] = flash_attn_func
    return function


class FlashAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is flash-attn's where that can take it.

    Raises ValueError where the package is not installed, or does not load.
    """

    def __init__(self) -> None:
        super().__init__()
        function = installed()
        if function is None:
            raise ValueError("flash-attn is not installed, or does not load")
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and takes(*args, **kwargs):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        swapped = (x.transpose(1, 2) for x in (query, key, value))
        return self._function(*swapped, softmax_scale=scale, causal=is_causal).transpose(1, 2)


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether flash-attn does this: [B, heads, T, D] of 16 bits on a GPU, without mask and dropout. (Of a causal mask
    its corner lies elsewhere where queries and keys differ in number.)"""
    return (
        _on_gpu(query)
        and attn_mask is None
        and not dropout_p
        and query.dim() == 4
        and query.dtype in _HALF
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= WIDEST
        and not (is_causal and query.shape[2] != key.shape[2])
    )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
