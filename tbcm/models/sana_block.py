"""Sana's transformer block on dual numbers, with the parts and the parameter names of diffusers' block."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformerBlock
from torch import Tensor, nn

from tbcm.models.dual import (
    Dual,
    add,
    cross_attention,
    dual,
    gated_residual,
    glu,
    linear_attention,
    modulate,
    pointwise,
)

KeysValues = tuple[Tensor, Tensor]
"""A layer's cross-attention keys and values of P prompts, [P, L, D] each."""


class SanaBlock(nn.Module):
    """Takes the place, and the submodules, of a diffusers block: weights load and save under the same names.

    `explicit`: cross-attention that torch.func.jvp can differentiate and that a recomputation repeats exactly, also
    where there is no tangent (see `tbcm.models.dual.cross_attention`).
    """

    def __init__(self, block: SanaTransformerBlock, *, explicit: bool) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.attn2 = block.attn2
        self.norm2, self.ff = block.norm2, block.ff
        self.scale_shift_table = block.scale_shift_table
        self.explicit = explicit

    def forward(
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
        x = gated_residual(x, gate, self._self_attention(modulate(dual(self.norm1, x), shift, scale), h.dtype))
        keys, values = self.keys_values(text) if isinstance(text, Tensor) else text
        x = add(x, self._cross_attention(x, keys, values, bias))
        return gated_residual(x, gate_ff, mix_ffn(self.ff, modulate(dual(self.norm2, x), shift_ff, scale_ff), size))

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
        x = _cast(x, dtype)
        attention: Attention = self.attn1
        query, key, value = (dual(layer, x) for layer in (attention.to_q, attention.to_k, attention.to_v))
        if attention.norm_q is not None:
            query, key = dual(attention.norm_q, query), dual(attention.norm_k, key)
        out = _cast(linear_attention(query, key, value, attention.heads), dtype)
        out = dual(attention.to_out[1], dual(attention.to_out[0], out))
        return _clip_half(out)

    def _cross_attention(self, x: Dual, keys: Tensor, values: Tensor, bias: Tensor) -> Dual:
        attention: Attention = self.attn2
        query = dual(attention.to_q, x)
        if attention.norm_q is not None:
            query = dual(attention.norm_q, query)
        out = cross_attention(query, keys, values, bias, attention.heads, explicit=self.explicit)
        return dual(attention.to_out[1], dual(attention.to_out[0], out))


def mix_ffn(ff: GLUMBConv, x: Dual, size: tuple[int, int]) -> Dual:
    """Sana's Mix-FFN of tokens [B, T, D]: 1 x 1, SiLU, depthwise 3 x 3 over the grid `size`, gate, 1 x 1.

    The image stays channels-last throughout, which is the layout of the tokens.
    """
    hidden = dual(ff.nonlinearity, pointwise(ff.conv_inverted, x))
    hidden = dual(ff.conv_depth, _map(lambda y: y.unflatten(1, size).permute(0, 3, 1, 2), hidden))
    hidden = _map(lambda y: y.permute(0, 2, 3, 1).flatten(1, 2), hidden)
    return pointwise(ff.conv_point, glu(hidden, dim=-1))


def _map(fn, x: Dual) -> Dual:  # type: ignore[no-untyped-def]
    """A linear `fn` that needs no rule: views and casts."""
    return fn(x[0]), None if x[1] is None else fn(x[1])


def _cast(x: Dual, dtype: torch.dtype) -> Dual:
    return _map(lambda y: y.to(dtype), x)


def _clip_half(x: Dual) -> Dual:
    """In fp16 what overflowed becomes the largest number, as in diffusers, and constant."""
    value, tangent = x
    if value.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max
    return value.clip(-limit, limit), None if tangent is None else torch.where(value.abs() <= limit, tangent, 0)
