"""Builders that several tests share: a Gaussian whose every quantity is known, and small random Sana networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tbcm.method.types import Condition, Prediction


def over(t: Tensor, x: Tensor) -> Tensor:
    """t [B] shaped to multiply x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """Data x_0 ~ N(mean, std^2) per element, in TrigFlow units, under x_t = cos(t) x_0 + sin(t) z, z ~ N(0, sigma_d^2).

    x_t is jointly Gaussian with x_0 and z, so both conditional means are linear in x_t, and the probability-flow ODE
    keeps (x_t - E x_t) / Std x_t constant.
    """

    mean: float
    std: float
    sigma_data: float

    def variance(self, t: Tensor) -> Tensor:
        return (t.cos() * self.std) ** 2 + (t.sin() * self.sigma_data) ** 2

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        """The exact velocity (cos(t) E[z | x_t] - sin(t) E[x_0 | x_t]) / sigma_d."""
        t = over(t, u)
        standard = (u * self.sigma_data - t.cos() * self.mean) / self.variance(t)
        x0 = self.mean + t.cos() * self.std**2 * standard
        z = t.sin() * self.sigma_data**2 * standard
        return (t.cos() * z - t.sin() * x0) / self.sigma_data

    def flow_map(self, x: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x_t at t = 0."""
        t = over(t, x)
        return self.mean + self.std * (x - t.cos() * self.mean) / self.variance(t).sqrt()

    def consistency_F(self, u: Tensor, t: Tensor) -> Tensor:
        """The F whose consistency function cos(t) x_t - sin(t) sigma_d F is the flow map."""
        x = u * self.sigma_data
        return (over(t.cos(), u) * x - self.flow_map(x, t)) / over(t.sin() * self.sigma_data, u)


@dataclass(frozen=True)
class Analytic:
    """A `Network` whose F(u, t) is a given function, the same for every prompt and guidance; logvar is 0."""

    fn: Callable[[Tensor, Tensor], Tensor]

    def __call__(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        if tangents is None:
            return Prediction(self.fn(u, t), None, torch.zeros_like(t))
        F, dF = torch.func.jvp(self.fn, (u, t), tangents)
        return Prediction(F, dF.detach(), torch.zeros_like(t))


class AnalyticStudent(nn.Module):
    """A student to train: a `Network` of its parameters' `F(u, t)` and `log_variance(t)`."""

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def log_variance(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        answer = Analytic(self.F)(u, t, condition, guidance, tangents)
        return Prediction(answer.F, answer.dF, self.log_variance(t))


TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "sample_size": 8,
    "qk_norm": "rms_norm_across_heads",
}
"""A SanaTransformer2DModel of 16,000 parameters with every kind of layer that the published ones have."""


def tiny_sana(seed: int = 0, **config: object) -> SanaTransformer2DModel:
    """A tiny backbone with random weights, no norm or bias at the zeros and ones where diffusers starts them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = SanaTransformer2DModel(**{**TINY, **config})
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
    return backbone


def random_condition(prompts: int, seed: int = 0, length: int = 5, dim: int = 12) -> Condition:
    """Text states [P, L, D] with a ragged mask: prompt p has L - (p mod L) tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = length - torch.arange(prompts) % length
    return Condition(
        {
            "embeds": torch.randn(prompts, length, dim, generator=generator),
            "mask": torch.arange(length) < tokens[:, None],
        }
    )


class NoHostSync(TorchDispatchMode):
    """Fails on the operators that wait for the device and bring a value to the host."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.name().startswith(self.FORBIDDEN), f"{func.name()} in a step"
        return func(*args, **(kwargs or {}))
