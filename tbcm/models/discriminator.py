"""A discriminator in the manner of LADD: small heads on the frozen teacher's tokens, one for each of a few layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized


def spread_layers(depth: int) -> list[int]:
    """Five layers, or all, spread over `depth` of them, counted from 0: 2, 8, 14, 19, 25 of 28."""
    heads = min(5, depth)
    return [int((i + 0.5) * depth / heads) for i in range(heads)]


class DiscriminatorHeads(nn.Module):
    """Scores of tokens [B, T, dim] from `layers` layers, laid out on a grid of T tokens: [B, layers * T], fp32.

    Weights are divided by their largest singular value (spectral normalisation), which bounds how fast a score can
    change. Its estimate moves on only in `renew`, once a step, so that a run does not depend on how often a step calls
    the heads, that is on micro-batches and ranks.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(dim) for _ in range(layers))
        self.eval()

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """`features`: for each layer, tokens of any float type; `size` (rows, columns) with T = rows * columns."""
        return torch.cat([head(x.float(), size) for head, x in zip(self.heads, features, strict=True)], 1)

    def renew(self) -> None:
        """One more step towards the weights' singular values."""
        with torch.no_grad():
            self.train()
            for layer in self.modules():
                if is_parametrized(layer, "weight"):
                    _ = layer.weight  # the parametrisation works when it is read
            self.eval()


class _Head(nn.Module):
    """Pointwise to a quarter of the width, then 3 x 3 with a residual, then a score for each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = max(1, dim // 4)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # layers differ in scale by orders of magnitude
        self.expand = spectral_norm(nn.Conv2d(dim, width, 1))
        self.mix = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.score = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        h = self.norm(x).transpose(1, 2).unflatten(-1, size)
        h = functional.leaky_relu(self.expand(h), 0.2)
        h = h + functional.leaky_relu(self.mix(h), 0.2)
        return self.score(h).flatten(1)
