"""Naming what is drawn: a linear classifier on image features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Classifier:
    """Softmax regression on standardised features: `fit` it, then ask `names` or `accuracy`."""

    classes: list[str]
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Sequence[str], decay: float = 3e-3, steps: int = 60) -> Classifier:
        """Minimises the cross entropy plus decay/2 |weight|^2 with L-BFGS; every class counts the same. Features
        [n, d]; the result is the same in every call."""
        classes = sorted(set(labels))
        target = torch.tensor([classes.index(label) for label in labels])
        std, mean = torch.std_mean(features, dim=0)
        std = std.clamp(min=1e-6)
        x = (features - mean) / std
        share = 1 / torch.bincount(target, minlength=len(classes)).float()
        weight = torch.zeros(len(classes), x.shape[1], requires_grad=True)
        bias = torch.zeros(len(classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, target, share) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(classes, mean, std, weight.detach(), bias.detach())

    def names(self, features: Tensor) -> list[str]:
        """The likeliest class of each row [n, d]."""
        scores = (features - self.mean) / self.std @ self.weight.T + self.bias
        return [self.classes[i] for i in scores.argmax(1).tolist()]
