"""The Sana backbones and inputs that the tests of the network run on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel
from helpers import random_condition, tiny_sana
from torch import Tensor

from tbcm.method.types import Prediction
from tbcm.models.sana.network import SanaTrigFlow

PROMPTS, POINTS = 2, 3
BACKBONES = {
    "plain": {},
    "guidance": {"guidance_embeds": True},
    "patch2": {"patch_size": 2, "guidance_embeds": True},
    "no_norm": {"qk_norm": None, "interpolation_scale": 1},
}
every_backbone = pytest.mark.parametrize("kind", BACKBONES)


def backbone_of(kind: str, **config: object) -> SanaTransformer2DModel:
    return tiny_sana(**{**BACKBONES[kind], **config})


class Batch:
    """Random inputs of P prompts with n points each, and a direction to differentiate along."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (8, 8)) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=dtype)
        samples = PROMPTS * POINTS
        self.condition = random_condition(PROMPTS)
        self.u, self.du, self.weight = (draw(samples, 4, *size) for _ in range(3))
        self.t = 0.1 + 1.4 * torch.rand(samples, generator=generator, dtype=dtype)
        self.dt = draw(samples)
        self.guidance = 4 + torch.rand(PROMPTS, generator=generator, dtype=dtype).repeat_interleave(POINTS)

    def predict(self, net: SanaTrigFlow, tangents: bool = True) -> Prediction:
        return net(self.u, self.t, self.condition, self.guidance, (self.du, self.dt) if tangents else None)

    def gradients(self, net: SanaTrigFlow, tangents: bool = True) -> dict[str, Tensor]:
        """Of a random projection of F, plus the log-variances."""
        net.zero_grad()
        answer = self.predict(net, tangents)
        loss = (answer.F * self.weight).sum()
        (loss if answer.logvar is None else loss + answer.logvar.sum()).backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def sprint_latents(
    pipe: SanaSprintPipeline, embeds: Tensor, mask: Tensor, draws: Sequence[torch.Generator], steps: int
) -> Tensor:
    """What plain diffusers draws of 64 px, with guidance 2.5."""
    pipe.set_progress_bar_config(disable=True)
    latents: Tensor = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask.float(),
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=2.5,
        generator=[*draws],
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
    )[0]
    return latents
