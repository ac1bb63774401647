"""A TrigFlow network over diffusers' SanaTransformer2DModel: teacher, student and EMA student.

The backbone keeps diffusers' parameter names, so its weights load and save with plain diffusers. Its forward pass is
written out here in parts (embed, blocks, head) because each part is differentiated, compiled or checkpointed on its
own: a tangent through the whole model at once holds three times the memory, and torch.func.jvp over a checkpointed
module fails in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from tbcm.method.trigflow import flow_input, flow_output, flow_time
from tbcm.method.types import Condition, Prediction
from tbcm.models.tangent import Dual, push, push_checkpointed

TangentMode = Literal["one_pass", "two_pass"]


class LinearAttention(SanaLinearAttnProcessor2_0):
    """Sana's ReLU linear attention with its sums and quotient in fp32, whatever autocast says.

    diffusers converts q, k and v to fp32, but under autocast the products go back to half precision: in fp16 the guard
    of the denominator, 1e-15, is then 0, and a query whose ReLU is all zero becomes NaN.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        with torch.autocast(hidden_states.device.type, enabled=False):
            # [B, T, D] -> [B, heads, T, D / heads]
            query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for x in (query, key, value))
            query, key = functional.relu(query), functional.relu(key)
            state = key.transpose(-1, -2) @ functional.pad(value, (0, 1), value=1.0)
            out = query @ state
            out = out[..., :-1] / (out[..., -1:] + 1e-15)
        out = out.transpose(1, 2).flatten(-2).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


class PromptCrossAttention:
    """Cross-attention of prompt-major samples to their prompt: queries [P n, T, D], text [P, L, D].

    The n samples of a prompt attend together, as one sequence of n T queries, so keys and values are projected once a
    prompt. PyTorch's fused attention kernels have no forward-mode derivative: a network that is differentiated
    (`explicit`) spells the softmax out, others take scaled_dot_product_attention.
    """

    def __init__(self, explicit: bool) -> None:
        self.explicit = explicit

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> Tensor:
        prompts = encoder_hidden_states.shape[0]
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (
            x.reshape(prompts, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (query, key, value)
        )
        bias = attention_mask[:, None]  # [P, 1, 1, L], the same for every head and query
        if self.explicit:
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            out = (scores + bias).softmax(-1).to(value.dtype) @ value
        else:
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        out = out.transpose(1, 2).reshape(hidden_states.shape[0], hidden_states.shape[1], -1)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def _run_block(block: nn.Module, h: Dual, temb: Dual, text: Tensor, bias: Tensor, size: tuple[int, int]) -> Dual:
    return push(lambda h, temb: block(h, None, text, bias, temb, *size), h, temb)[0]


class SanaTrigFlow(nn.Module):
    """F(u, t | prompt, guidance) of a Sana backbone trained by flow matching (see `tbcm.method.types.Network`).

    `timestep_scale`: the backbone is given s * timestep_scale, s in [0, 1] the flow-matching time.
    `logvar`: adds the learned log-variance head of the adaptive weighting, on the time (and guidance) embedding.
    `tangent`: one_pass computes F and its derivative together; two_pass runs the network twice, first for the
    derivative without a graph, then for F with one. `differentiable` False: a frozen network that is never asked for a
    derivative. `gradient_checkpointing`: keep block inputs only, recompute blocks (not their tangents) in backward.
    `compiled`: torch.compile per block (two graphs, whatever the depth), not together with checkpointing.
    """

    def __init__(
        self,
        backbone: SanaTransformer2DModel,
        *,
        timestep_scale: float,
        logvar: bool = False,
        differentiable: bool = True,
        tangent: TangentMode = "one_pass",
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.timestep_scale = timestep_scale
        self.tangent = tangent
        self.gradient_checkpointing = gradient_checkpointing
        self.guidance_scale = float(backbone.config.guidance_embeds_scale) if backbone.config.guidance_embeds else None
        processor = PromptCrossAttention(explicit=differentiable)
        for block in backbone.transformer_blocks:
            block.attn1.set_processor(LinearAttention())
            block.attn2.set_processor(processor)
        self.logvar_head = nn.Linear(backbone.scale_shift_table.shape[1], 1) if logvar else None
        if self.logvar_head is not None:
            nn.init.zeros_(self.logvar_head.weight)
            nn.init.zeros_(self.logvar_head.bias)
        self._block: Callable[..., Dual] = (
            torch.compile(_run_block, fullgraph=True, dynamic=False) if compiled else _run_block
        )

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        """See `tbcm.method.types.Network`. Raises ValueError where the batch is no multiple of the prompts."""
        if u.shape[0] % len(condition):
            raise ValueError(f"{u.shape[0]} samples cannot be shared out evenly over {len(condition)} prompts")
        if tangents is None:
            return self._predict((u, None), (t, None), condition, guidance)
        if self.tangent == "one_pass":
            return self._predict((u, tangents[0]), (t, tangents[1]), condition, guidance)
        with torch.no_grad():
            dF = self._predict((u, tangents[0]), (t, tangents[1]), condition, guidance).dF
        primal = self._predict((u, None), (t, None), condition, guidance)
        return Prediction(primal.F, dF, primal.logvar)

    def _predict(self, u: Dual, t: Dual, condition: Condition, guidance: Tensor | None) -> Prediction:
        size = tuple(n // self.backbone.config.patch_size for n in u[0].shape[-2:])
        text, bias = self._text(condition)
        h, temb, emb = push(lambda u, t: self._embed(u, t, guidance), u, t)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.backbone.transformer_blocks:
            if checkpointing:
                h = self._checkpointed(block, h, temb, text, bias, size)
            else:
                h = self._block(block, h, temb, text, bias, size)
        ((F, dF),) = push(lambda h, emb, u, t: self._head(h, emb, u, t), h, emb, u, t)
        logvar = None
        if self.logvar_head is not None:
            with torch.autocast(u[0].device.type, enabled=False):
                logvar = self.logvar_head(emb[0].to(self.logvar_head.weight.dtype)).squeeze(-1)
        return Prediction(F, dF, logvar)

    def _checkpointed(
        self, block: nn.Module, h: Dual, temb: Dual, text: Tensor, bias: Tensor, size: tuple[int, int]
    ) -> Dual:
        def run(h: Tensor, temb: Tensor, text: Tensor) -> Tensor:
            return block(h, None, text, bias, temb, *size)

        return push_checkpointed(run, h, temb, text, [p for p in block.parameters() if p.requires_grad])

    def _text(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Projected text [P, L, D] and the additive mask [P, 1, L], as diffusers makes them."""
        net, dtype = self.backbone, self.backbone.dtype
        embeds, mask = condition.tensors["embeds"].to(dtype), condition.tensors["mask"]
        return net.caption_norm(net.caption_projection(embeds)), ((1 - mask.to(dtype)) * -10000.0)[:, None]

    def _embed(self, u: Tensor, t: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, T, D], block modulation [B, 6 D] and time (+ guidance) embedding [B, D]."""
        net, s = self.backbone, flow_time(t)
        # Contiguous, as blocks return it: with other strides the first block would have a compiled graph of its own.
        h = net.patch_embed(flow_input(u, s).to(net.dtype)).contiguous()
        options: dict[str, object] = {"hidden_dtype": h.dtype}
        if self.guidance_scale is not None:
            if guidance is None:
                raise ValueError("this network embeds its guidance scale: pass `guidance` [B]")
            options["guidance"] = guidance * self.guidance_scale
        temb, emb = net.time_embed(s * self.timestep_scale, **options)
        return h, temb, emb

    def _head(self, h: Tensor, emb: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """Tokens -> velocity [B, C, H, W] -> F, in the dtype of u."""
        net, p = self.backbone, self.backbone.config.patch_size
        h = net.proj_out(net.norm_out(h, emb, net.scale_shift_table))
        height, width = u.shape[-2] // p, u.shape[-1] // p
        v = h.unflatten(1, (height, width)).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)
        v = v.reshape(u.shape[0], -1, *u.shape[-2:]).to(u.dtype)
        s = flow_time(t)
        return flow_output(flow_input(u, s), v, s)
