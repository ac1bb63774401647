"""What Sana's embedding of a guidance scale comes to for one scale."""

from __future__ import annotations

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from tbcm.models.architecture import defaults_of
from tbcm.models.sana.network import SanaTrigFlow


@torch.no_grad()
def guidance_shift(student: SanaTrigFlow, guidance: float) -> Tensor:
    """What a guidance scale adds behind the second layer of the time's embedder, [D]."""
    assert student.guidance_scale is not None
    embed = student.backbone.time_embed
    w = torch.full((1,), guidance, device=embed.guidance_embedder.linear_1.weight.device)
    waves = embed.guidance_condition_proj(w * student.guidance_scale)
    shift: Tensor = embed.guidance_embedder(waves.to(embed.guidance_embedder.linear_1.weight.dtype))[0]
    return shift


@torch.no_grad()
def without_guidance(student: SanaTrigFlow, guidance: float) -> SanaTransformer2DModel:
    """A backbone that embeds no guidance, equal to the student's at one scale."""
    backbone = student.backbone
    known = defaults_of(SanaTransformer2DModel)
    config = {key: value for key, value in backbone.config.items() if key in known} | {"guidance_embeds": False}
    plain = SanaTransformer2DModel(**config)
    state = {
        key.replace("time_embed.timestep_embedder.", "time_embed.emb.timestep_embedder."): value.clone()
        for key, value in backbone.state_dict().items()
        if not key.startswith("time_embed.guidance_embedder.")
    }
    state["time_embed.emb.timestep_embedder.linear_2.bias"] += guidance_shift(student, guidance)
    plain.load_state_dict(state)
    return plain.to(next(backbone.parameters()).dtype)
