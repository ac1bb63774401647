"""A TrigFlow network over diffusers' SanaTransformer2DModel: teacher, student and EMA student.

The backbone keeps diffusers' parameter names, so its weights load and save with plain diffusers. Its forward pass is
written out here in parts (embed, blocks, head), on dual numbers (`tbcm.models.differentiation.dual`); each block is
compiled or checkpointed on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from tbcm_kernels.catalog import Dual
from tbcm_kernels.norm_modulate import norm_modulate
from torch import Tensor, nn

from tbcm.config.section import Checkpointing, Derivative, TangentMode
from tbcm.method.rollout import Velocity, guided
from tbcm.method.trigflow import T_MAX, flow_input, flow_output, flow_time
from tbcm.method.types import Condition, Prediction
from tbcm.models.differentiation.checkpointing import full_checkpoint, selective_checkpoint
from tbcm.models.differentiation.compiling import compiled as compile_whole
from tbcm.models.differentiation.dual import activations_dtype, cast, dual, tangent_rule
from tbcm.models.differentiation.tangent import push
from tbcm.models.sana.block import KeysValues, SanaBlock, plain_norm

Text = list[Tensor | KeysValues]
"""For each block, the text's states or the block's keys and values of it."""


@tangent_rule(PatchEmbed)
def _patch_embed(layer: PatchEmbed, x: Tensor, dx: Tensor) -> Tensor:
    return layer.proj._conv_forward(dx, layer.proj.weight, None).flatten(2).transpose(1, 2)


class SanaTrigFlow(nn.Module):
    """F(u, t | prompt, guidance) of a Sana backbone trained by flow matching (see `tbcm.method.types.Network`).

    Takes the backbone over: its blocks become `SanaBlock`s, under the same parameter names.

    Args:
        timestep_scale: the backbone is given s * timestep_scale, s in [0, 1] the flow-matching time.
        logvar: adds the learned log-variance head of the adaptive weighting, on the time (and guidance) embedding.
        differentiable: False for a frozen network that is never asked for a derivative.
        tangent: one_pass computes F and its derivative together; two_pass runs the network twice, first for the
            derivative without a graph, then for F with one.
        derivative: dual computes it by hand-written rules; jvp by torch.func.jvp, the general and slower way.
        checkpointing: what of a block is recomputed in backward, never its tangent: none; selective, all but matrix
            products (dual only); full, the whole block.
        compiled: torch.compile per block: a graph per kind of call and size of images, whatever the depth.
        text_once: a prompt's keys and values are projected once for all its samples; False: for each of them.
    """

    def __init__(
        self,
        backbone: SanaTransformer2DModel,
        *,
        timestep_scale: float,
        logvar: bool = False,
        differentiable: bool = True,
        tangent: TangentMode = "one_pass",
        derivative: Derivative = "dual",
        checkpointing: Checkpointing = "none",
        compiled: bool = False,
        text_once: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.timestep_scale = timestep_scale
        self.tangent, self.derivative, self.checkpointing = tangent, derivative, checkpointing
        self.compiled, self.text_once = compiled, text_once
        self.guidance_scale = float(backbone.config.guidance_embeds_scale) if backbone.config.guidance_embeds else None
        backbone.transformer_blocks = nn.ModuleList(
            SanaBlock(block, explicit=differentiable) for block in backbone.transformer_blocks
        )
        table = backbone.scale_shift_table
        self.logvar_head = nn.Linear(table.shape[1], 1, device=table.device) if logvar else None
        if self.logvar_head is not None:
            nn.init.zeros_(self.logvar_head.weight)
            nn.init.zeros_(self.logvar_head.bias)
        self._block: Callable[..., Dual] = _run_block_by_jvp if derivative == "jvp" else _run_block
        if compiled:
            self._block = compile_whole(self._block, fold=derivative == "jvp")

    @property
    def t_max(self) -> float:
        """Where generation starts: Sana is trained by flow matching."""
        return T_MAX

    capturable = True

    def recompute(self, checkpointing: Checkpointing) -> None:
        """See `tbcm.method.types.TeacherNetwork`."""
        self.checkpointing = checkpointing

    @property
    def embeds_guidance(self) -> bool:
        return self.guidance_scale is not None

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.transformer_blocks

    @property
    def width(self) -> int:
        """Of tokens, and of the time's embedding."""
        return int(self.backbone.scale_shift_table.shape[1])

    def guided(self, condition: Condition, null: Condition, guidance: Tensor) -> Velocity:
        """Both branches in one batch, for the caller to combine: Sana's guidance is linear."""
        return guided(self, condition, null)

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        """See `tbcm.method.types.Network`. Raises ValueError where the batch is no multiple of the prompts."""
        condition = self._shared_out(u, condition)
        if tangents is None:
            return self._predict((u, None), (t, None), condition, guidance)
        if self.tangent == "one_pass":
            return self._predict((u, tangents[0]), (t, tangents[1]), condition, guidance)
        with torch.no_grad():
            dF = self._predict((u, tangents[0]), (t, tangents[1]), condition, guidance).dF
        primal = self._predict((u, None), (t, None), condition, guidance)
        return Prediction(primal.F, dF, primal.logvar)

    @torch.no_grad()
    def prepare(self, condition: Condition) -> Condition:
        """Keys and values of all layers for P prompts, [P, layers, L, D] each, and the mask: for a frozen network that
        is called many times with the same prompts. Without `text_once` the condition as it is."""
        if not self.text_once:
            return condition
        text = self._text_states(condition)
        pairs = [block.keys_values(text) for block in self.backbone.transformer_blocks]
        keys, values = (torch.stack(parts, dim=1) for parts in zip(*pairs, strict=True))
        return Condition({"keys": keys, "values": values, "mask": condition.tensors["mask"]})

    def features(
        self, u: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Tokens [B, T, D] after the blocks `layers` (ascending, from 0), with a graph to u; later blocks do not run.

        For discriminators on a frozen network (arguments as for `forward`).
        """
        condition = self._shared_out(u, condition)
        h, temb, _ = self._embed((u, None), (t, None), guidance)
        states = self._through_blocks(h, temb, condition, self._grid(u))
        found = {i: tokens for i, (tokens, _) in enumerate(islice(states, layers[-1] + 1)) if i in layers}
        return [found[i] for i in layers]

    def _predict(self, u: Dual, t: Dual, condition: Condition, guidance: Tensor | None) -> Prediction:
        h, temb, emb = self._differentiated(lambda u, t: self._embed(u, t, guidance), u, t)
        for h in self._through_blocks(h, temb, condition, self._grid(u[0])):  # noqa: B007, B020
            pass
        ((F, dF),) = self._differentiated(self._head, h, emb, u, t)
        logvar = None
        if self.logvar_head is not None:
            with torch.autocast(u[0].device.type, enabled=False):
                logvar = self.logvar_head(emb[0].to(self.logvar_head.weight.dtype)).squeeze(-1)
        return Prediction(F, dF, logvar)

    def _shared_out(self, u: Tensor, condition: Condition) -> Condition:
        if u.shape[0] % len(condition):
            raise ValueError(f"{u.shape[0]} samples cannot be shared out evenly over {len(condition)} prompts")
        return condition if self.text_once else condition.repeat(u.shape[0] // len(condition))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens, for latents of this size."""
        patch = self.backbone.config.patch_size
        return height // patch, width // patch

    def _grid(self, u: Tensor) -> tuple[int, int]:
        return self.grid(*u.shape[-2:])

    def _through_blocks(self, h: Dual, temb: Dual, condition: Condition, size: tuple[int, int]) -> Iterator[Dual]:
        """Tokens after each block."""
        mask = condition.tensors["mask"].to(self.backbone.dtype)
        bias = ((1 - mask) * -10000.0)[:, None]  # as in diffusers: [P, 1, L]
        for block, text in zip(self.backbone.transformer_blocks, self._text(condition), strict=True):
            h = block(self._run, h, temb, text, bias, size)
            yield h

    def _differentiated(self, part: Callable[..., tuple[Dual, ...]], *inputs: Dual) -> tuple[Dual, ...]:
        if self.derivative == "dual":
            return part(*inputs)
        return push(lambda *values: tuple(y for y, _ in part(*((value, None) for value in values))), *inputs)

    def _run(
        self, block: SanaBlock, h: Dual, temb: Dual, text: Tensor | KeysValues, bias: Tensor, size: tuple[int, int]
    ) -> Dual:
        # A compiler's own choice of what to keep is selective.
        keep_all = self.checkpointing == "none" or (self.checkpointing == "selective" and self.compiled)
        if keep_all or not torch.is_grad_enabled():
            return self._block(block, h, temb, text, bias, size)
        assert isinstance(text, Tensor), "prepared text is for frozen networks: it has no gradient"

        def run(h: Tensor, dh: Tensor | None, temb: Tensor, dtemb: Tensor | None, text: Tensor) -> Dual:
            return self._block(block, (h, dh), (temb, dtemb), text, bias, size)

        if self.checkpointing == "selective":
            return selective_checkpoint(run, h, temb, text)
        return full_checkpoint(run, h, temb, text, [p for p in block.parameters() if p.requires_grad])

    def _text(self, condition: Condition) -> Text:
        blocks = len(self.backbone.transformer_blocks)
        if "keys" not in condition.tensors:
            return [self._text_states(condition)] * blocks
        keys, values = condition.tensors["keys"], condition.tensors["values"]
        return [(keys[:, i], values[:, i]) for i in range(blocks)]

    def _text_states(self, condition: Condition) -> Tensor:
        """Projected text [P, L, D]."""
        net = self.backbone
        return net.caption_norm(net.caption_projection(condition.tensors["embeds"].to(net.dtype)))

    def _embed(self, u: Dual, t: Dual, guidance: Tensor | None) -> tuple[Dual, Dual, Dual]:
        """Tokens [B, T, D], block modulation [B, 6 D] and time (+ guidance) embedding [B, D]."""
        net = self.backbone
        # Elementwise, in fp32, and small: torch.func.jvp wastes nothing on them.
        x, time = push(lambda u, t: (flow_input(u, flow_time(t)), flow_time(t) * self.timestep_scale), u, t)
        h = dual(net.patch_embed, cast(x, net.dtype))
        emb = self._time_embedding(time, h[0].dtype, guidance)
        # Laid out and typed as blocks return it, or the first block would have a compiled graph of its own.
        h = cast((h[0].contiguous(), None if h[1] is None else h[1].contiguous()), net.dtype)
        return h, dual(net.time_embed.linear, dual(net.time_embed.silu, emb)), emb

    def _time_embedding(self, time: Dual, dtype: torch.dtype, guidance: Tensor | None) -> Dual:
        """[B, D] of the network's time [B] and, where it embeds one, of guidance [B]."""
        embed = self.backbone.time_embed
        owner = embed if self.guidance_scale is not None else embed.emb  # diffusers nests the one without guidance
        ((waves, dwaves),) = push(owner.time_proj, time)
        waves_in = cast((waves, dwaves), dtype)
        layers = owner.timestep_embedder
        emb = dual(layers.linear_2, dual(layers.act, dual(layers.linear_1, waves_in)))
        if self.guidance_scale is None:
            return emb
        if guidance is None:
            raise ValueError("this network embeds its guidance scale: pass `guidance` [B]")
        waves = embed.guidance_condition_proj(guidance * self.guidance_scale)
        return emb[0] + embed.guidance_embedder(waves.to(dtype)), emb[1]

    def _head(self, h: Dual, emb: Dual, u: Dual, t: Dual) -> tuple[Dual]:
        """Tokens -> velocity [B, C, H, W] -> F, in the dtype of u."""
        net, p = self.backbone, self.backbone.config.patch_size
        table = net.scale_shift_table
        shift, scale = (((table[i] + emb[0])[:, None], None if emb[1] is None else emb[1][:, None]) for i in (0, 1))
        eps = plain_norm(net.norm_out.norm)
        h = dual(net.proj_out, norm_modulate(h, shift, scale, eps, activations_dtype(h[0])))
        height, width = u[0].shape[-2] // p, u[0].shape[-1] // p

        def output(h: Tensor, u: Tensor, t: Tensor) -> Tensor:
            v = h.unflatten(1, (height, width)).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)
            v = v.reshape(u.shape[0], -1, *u.shape[-2:]).to(u.dtype)
            s = flow_time(t)
            return flow_output(flow_input(u, s), v, s)

        (F,) = push(output, h, u, t)
        return (F,)


def _run_block(
    block: SanaBlock, h: Dual, temb: Dual, text: Tensor | KeysValues, bias: Tensor, size: tuple[int, int]
) -> Dual:
    return block.compute(*h, *temb, text, bias, size)


def _run_block_by_jvp(
    block: SanaBlock, h: Dual, temb: Dual, text: Tensor | KeysValues, bias: Tensor, size: tuple[int, int]
) -> Dual:
    return push(lambda h, temb: block.compute(h, None, temb, None, text, bias, size)[0], h, temb)[0]
