"""Where a network embeds its time: there a guidance scale can be added, and the log-variance head reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from tbcm.errors import UserError

_OTHERS = ("guidance_embedder", "add_embedding", "resolution_embedder", "aspect_ratio_embedder", "pooled_embedder")
"""Modules of the same class that embed something else."""
_WAVES = 64
_HIDDEN = 256


@dataclass(frozen=True)
class TimeEmbedder:
    """A module whose output embeds the time, and the layer within it that is added last."""

    name: str
    module: nn.Module
    last: nn.Linear

    @property
    def width(self) -> int:
        return self.last.out_features


def time_embedders(backbone: nn.Module) -> list[TimeEmbedder]:
    """Most networks have one; DiT has one a block."""
    found = []
    for name, module in backbone.named_modules():
        if name.endswith(_OTHERS):
            continue
        if isinstance(module, TimestepEmbedding):
            found.append(TimeEmbedder(name, module, module.linear_2))
        elif type(module).__name__ == "TimestepEmbedder" and isinstance(getattr(module, "mlp", None), nn.Sequential):
            found.append(TimeEmbedder(name, module, module.mlp[2]))  # Z-Image
        elif name == "distilled_guidance_layer.in_proj":  # Chroma embeds it together with the layer's number
            assert isinstance(module, nn.Linear)
            found.append(TimeEmbedder(name, module, module))
    return found


class GuidanceEmbedding(nn.Module):
    """g(w) [B, width] of a guidance scale w [B], zero at first: sines of w, two layers, and one last layer for each
    embedder.

    Args:
        scale: what w is multiplied by before; guidances 3 and 5 are to differ by much of their sines.
    """

    def __init__(self, widths: list[int], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(_WAVES, _HIDDEN)
        layers = [nn.Linear(_HIDDEN, width) for width in widths]
        for layer in layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.last = nn.ModuleList(layers)

    def forward(self, guidance: Tensor) -> list[Tensor]:
        waves = get_timestep_embedding(guidance * self.scale, _WAVES, flip_sin_to_cos=True, downscale_freq_shift=0)
        hidden = functional.silu(self.hidden(waves.to(self.hidden.weight.dtype)))
        return [layer(hidden) for layer in self.last]


@torch.no_grad()
def fold_guidance(backbone: nn.Module, embedding: GuidanceEmbedding, guidance: float) -> None:
    """Adds g(guidance) to the biases behind which it stood: the network of that one scale, without the embedding.

    Raises:
        UserError: a time embedding without biases.
    """
    device = embedding.hidden.weight.device
    found = time_embedders(backbone)
    for embedder, g in zip(found, embedding(torch.full((1,), guidance, device=device)), strict=True):
        if embedder.last.bias is None:
            raise UserError(
                f"{embedder.name} has no bias: the guidance scale {guidance:g} cannot be folded into it for export;"
                f" a student of one scale (method.guidance=[{guidance:g}]) embeds none and can be exported"
            )
        embedder.last.bias.add_(g[0].to(embedder.last.bias))
