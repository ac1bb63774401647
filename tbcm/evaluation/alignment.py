"""How well images go with their captions, in a space that both are brought to: cosines and retrieval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RidgeMap:
    """A linear map from image features [N, d] to text embeddings [N, k], with the means taken off on both sides: what
    all captions share says nothing about which one an image goes with."""

    feature_mean: Tensor
    text_mean: Tensor
    weight: Tensor  # [d, k]

    @classmethod
    def fit(cls, features: Tensor, texts: Tensor, strength: float) -> RidgeMap:
        """Minimises |(x - mean) W - (y - mean)|^2 + strength v |W|^2 in float64, v the mean variance of a feature times
        N, so that `strength` has no units."""
        x, y = features.double(), texts.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        gram = x.T @ x
        gram.diagonal().add_(strength * gram.diagonal().mean())
        return cls(x_mean, y_mean, torch.linalg.solve(gram, x.T @ y))

    def images(self, features: Tensor) -> Tensor:
        """[N, d] -> [N, k] float64."""
        return (features.double() - self.feature_mean) @ self.weight

    def texts(self, embeddings: Tensor) -> Tensor:
        """[N, k] -> [N, k] float64."""
        return embeddings.double() - self.text_mean


def alignment(images: Tensor, texts: Tensor) -> tuple[float, float, float]:
    """Of N images and their N captions, both as [N, k] in one space, N >= 2.

    Returns:
        The mean cosine of an image with its own caption, that with the captions of the others, and the share of images
        whose own caption is the nearest (equal captions count as one; by chance 1 / N).
    """
    if images.ndim != 2 or images.shape != texts.shape or len(images) < 2:
        raise ValueError(f"give images and texts [N, k], N >= 2, not {list(images.shape)} and {list(texts.shape)}")
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own, n = cosines.diagonal(), len(cosines)
    others = (cosines.sum() - own.sum()) / (n * (n - 1))
    # Equal captions have equal columns but for rounding, hence the tolerance.
    top = (own >= cosines.max(1).values - 1e-6).to(own.dtype).mean()
    return own.mean().item(), others.item(), top.item()
