"""Sana's transformer block on dual numbers, with the parts and the parameter names of diffusers' block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformerBlock
from tbcm_kernels.catalog import Dual
from tbcm_kernels.cross_attention import cross_attention
from tbcm_kernels.gated_residual import gated_residual, gated_residual_and_copy, residual_norm_modulate
from tbcm_kernels.glu_depthwise import glu_depthwise
from tbcm_kernels.linear_attention import linear_attention
from tbcm_kernels.norm_modulate import stream_and_norm
from torch import Tensor, nn

from tbcm.models.differentiation.dual import activations_dtype, cast, dual, pointwise, side_by_side

KeysValues = tuple[Tensor, Tensor]
"""A layer's cross-attention keys and values of P prompts, [P, L, D] each."""


class SanaBlock(nn.Module):
    """Takes the place, and the submodules, of a diffusers block: weights load and save under the same names.

    `explicit`: cross-attention that torch.func.jvp can differentiate and that a recomputation repeats exactly, also
    where there is no tangent (see `tbcm_kernels.cross_attention`; its kernel needs no such choice).
    """

    def __init__(self, block: SanaTransformerBlock, *, explicit: bool) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.attn2 = block.attn2
        self.norm2, self.ff = block.norm2, block.ff
        self.scale_shift_table = block.scale_shift_table
        self.explicit = explicit

    def forward(self, run: Callable[..., Dual], *inputs: Any) -> Dual:
        """`run(self, *inputs)`, which calls `compute`, perhaps compiled, checkpointed or under torch.func.jvp: within
        this call, so that who shards weights by hooks on it (FSDP) has gathered them before any of that begins."""
        return run(self, *inputs)

    def compute(
        self,
        h: Tensor,
        dh: Tensor | None,
        temb: Tensor,
        dtemb: Tensor | None,
        text: Tensor | KeysValues,
        bias: Tensor,
        size: tuple[int, int],
    ) -> Dual:
        """Tokens h [B, T, D] and their tangent, given modulation temb [B, 6 D], the text's states [P, L, D] or this
        layer's keys and values of it, the mask as a bias [P, 1, L] and the grid of the T tokens (rows, columns)."""
        x: Dual = (h, dh)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self._modulation((temb, dtemb))
        dtype = activations_dtype(h)
        x, y = stream_and_norm(x, shift, scale, plain_norm(self.norm1), dtype)
        x, y = gated_residual_and_copy(x, gate, self._self_attention(y, dtype), dtype)
        keys, values = self.keys_values(text) if isinstance(text, Tensor) else text
        attended = self._cross_attention(y, keys, values, bias, dtype)
        x, y = residual_norm_modulate(x, attended, None, shift_ff, scale_ff, plain_norm(self.norm2), dtype)
        return gated_residual(x, gate_ff, mix_ffn(self.ff, y, size))

    def keys_values(self, text: Tensor) -> KeysValues:
        """Of text states [P, L, D]; the same for every time and every state of the image."""
        keys, values = self.attn2.to_k(text), self.attn2.to_v(text)
        return keys if self.attn2.norm_k is None else self.attn2.norm_k(keys), values

    def _modulation(self, temb: Dual) -> list[Dual]:
        """Shift, scale and gate [B, 1, D] of self-attention, then those of the feed-forward network."""
        values = (self.scale_shift_table + temb[0].unflatten(-1, (6, -1))).chunk(6, dim=1)
        if temb[1] is None:
            return [(value, None) for value in values]
        return list(zip(values, temb[1].unflatten(-1, (6, -1)).chunk(6, dim=1), strict=True))

    def _self_attention(self, x: Dual, dtype: torch.dtype) -> Dual:
        attention: Attention = self.attn1
        qkv = side_by_side((attention.to_q, attention.to_k, attention.to_v), x)
        (norm_q, eps), (norm_k, _) = rms_norm(attention.norm_q), rms_norm(attention.norm_k)
        out = linear_attention(qkv, norm_q, norm_k, eps, attention.heads, dtype)
        return _clip_half(dual(attention.to_out[1], dual(attention.to_out[0], out)))

    def _cross_attention(self, x: Dual, keys: Tensor, values: Tensor, bias: Tensor, dtype: torch.dtype) -> Dual:
        attention: Attention = self.attn2
        query = dual(attention.to_q, x)
        if attention.norm_q is not None:
            query = cast(dual(attention.norm_q, query), dtype)  # as attention would: half of what it reads
        out = cross_attention(query, keys, values, bias, attention.heads, explicit=self.explicit)
        return dual(attention.to_out[1], dual(attention.to_out[0], out))


def mix_ffn(ff: GLUMBConv, x: Dual, size: tuple[int, int]) -> Dual:
    """Sana's Mix-FFN of tokens [B, T, D]: 1 x 1, SiLU, depthwise 3 x 3 over the grid `size`, gate, 1 x 1.

    The image stays channels-last throughout, which is the layout of the tokens.
    """
    depthwise, act = ff.conv_depth, ff.nonlinearity
    if type(depthwise) is not nn.Conv2d or type(act) is not nn.SiLU:
        raise TypeError(f"a Sana block whose Mix-FFN is of {depthwise} and {act} is not supported")
    hidden = glu_depthwise(pointwise(ff.conv_inverted, x), depthwise.weight, depthwise.bias, size)
    return pointwise(ff.conv_point, hidden)


# Operators take numbers and weights: read from layers of exactly the types that they stand for, so that an adapter's is
# refused and not passed over.


def plain_norm(layer: nn.Module) -> float:
    """eps of a LayerNorm over the width that has no weights. Raises TypeError for any other layer."""
    if type(layer) is not nn.LayerNorm or layer.elementwise_affine:
        raise TypeError(f"a Sana block with this norm is not supported: {layer}")
    return layer.eps


def rms_norm(layer: nn.Module | None) -> tuple[Tensor | None, float]:
    """Weight and eps of an RMSNorm across heads (None: no norm). Raises TypeError for any other layer."""
    if layer is None:
        return None, 0.0
    if type(layer) is not RMSNorm or layer.weight is None or layer.bias is not None:
        raise TypeError(f"a Sana block with this norm of queries and keys is not supported: {layer}")
    return layer.weight, layer.eps


def _clip_half(x: Dual) -> Dual:
    """In fp16 what overflowed becomes the largest number, as in diffusers, and constant."""
    value, tangent = x
    if value.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max
    return value.clip(-limit, limit), None if tangent is None else torch.where(value.abs() <= limit, tangent, 0)
