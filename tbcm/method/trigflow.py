"""TrigFlow coordinates, and the exact changes of variables to them from flow matching, EDM and variance-preserving.

    x_t = cos(t) x_0 + sin(t) z,    z ~ N(0, sigma_d^2 I),    t in [0, t_max]
    dx_t/dt = sigma_d F(x_t / sigma_d, t)                    (probability-flow ODE; paper Tab. 1)
    f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)    (the consistency function)

Two scales of the clean latent: `xbar_0` is the backbone's own scaled latent (std about 1), `x_0` TrigFlow's:
x_0 = sigma_d xbar_0 for flow matching and variance-preserving, x_0 = xbar_0 for EDM. A network is given
u = x_t / sigma_d. Times are tensors of any shape in radians; `per_sample` makes them broadcast against [B, C, H, W].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

T_MAX = math.pi / 2
"""Where flow matching and zero-terminal-SNR teachers start: pure noise."""


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply `like` [B, ...]."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def rotate(x: Tensor, dxdt: Tensor, angle: Tensor) -> Tensor:
    """One step of the probability-flow ODE from t to t - angle: cos(angle) x_t - sin(angle) dx_t/dt.

    Exact for constant x_0-hat (first-order exponential integrator); with angle = t it is the consistency function.
    (The paper's Eq. 9 multiplies dx/dt by another sigma_d, which its Algorithm 1 does not.)
    """
    angle = per_sample(angle, x)
    return torch.cos(angle) * x - torch.sin(angle) * dxdt


def renoise(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The forward process: cos(t) x_0 + sin(t) z, with z ~ N(0, sigma_d^2)."""
    t = per_sample(t, x0)
    return torch.cos(t) * x0 + torch.sin(t) * z


# Flow matching: x_s = (1 - s) xbar_0 + s e, v = e - xbar_0, s in [0, 1] (paper Eq. 5-7).


def flow_time(t: Tensor) -> Tensor:
    """TrigFlow time -> flow-matching time s = sin t / (sin t + cos t) (paper Eq. 5)."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def time_from_flow(s: Tensor) -> Tensor:
    """Flow-matching time -> TrigFlow time, atan2(s, 1 - s): the inverse of paper Eq. 5."""
    return torch.atan2(s, 1 - s)


def flow_input(u: Tensor, s: Tensor) -> Tensor:
    """u = x_t / sigma_d -> x_s = u sqrt(s^2 + (1 - s)^2) (paper Eq. 6)."""
    s = per_sample(s, u)
    return u * torch.sqrt(s**2 + (1 - s) ** 2)


def flow_output(x_s: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """A flow-matching velocity as TrigFlow's F (paper Eq. 7):
    F = [(1 - 2s) x_s + (1 - 2s + 2s^2) v] / sqrt(s^2 + (1 - s)^2)."""
    s = per_sample(s, x_s)
    return ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * v) / torch.sqrt(s**2 + (1 - s) ** 2)


def flow_velocity(x_s: Tensor, F: Tensor, s: Tensor) -> Tensor:
    """The inverse of `flow_output`: TrigFlow's F as a flow-matching velocity."""
    s = per_sample(s, x_s)
    return (F * torch.sqrt(s**2 + (1 - s) ** 2) - (1 - 2 * s) * x_s) / (1 - 2 * s + 2 * s**2)


# EDM: x_sigma = x_0 + sigma n, D(x_sigma, sigma) predicts x_0.


def edm_sigma(t: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow time -> EDM noise level sigma = sigma_d tan t."""
    return sigma_data * torch.tan(t)


def time_from_edm(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM noise level -> TrigFlow time atan(sigma / sigma_d)."""
    return torch.atan(sigma / sigma_data)


def edm_t_max(sigma_max: float, sigma_data: float) -> float:
    """An EDM teacher starts at atan(sigma_max / sigma_d), short of pi/2: tan(pi/2) means nothing in fp32."""
    return math.atan(sigma_max / sigma_data)


def edm_input(u: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """u = x_t / sigma_d -> x_sigma = x_t / cos t."""
    return sigma_data * u / per_sample(torch.cos(t), u)


def edm_output(u: Tensor, denoised: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """A denoiser's answer D(x_sigma, sigma) as F = (cos(t) x_t - D) / (sigma_d sin t)."""
    t = per_sample(t, u)
    return (torch.cos(t) * sigma_data * u - denoised) / (sigma_data * torch.sin(t))


# Variance-preserving: x = alpha xbar_0 + sigma e with alpha^2 + sigma^2 = 1, so x = u, alpha = cos t, sigma = sin t.


def time_from_vp(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Variance-preserving (alpha, sigma) -> TrigFlow time atan2(sigma, alpha). v-prediction is F itself."""
    return torch.atan2(sigma, alpha)


def vp_output_from_eps(u: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """An eps-prediction as F = (eps - sin(t) u) / cos(t), i.e. v = cos(t) eps - sin(t) xbar_0 with
    xbar_0 = (u - sin(t) eps) / cos(t). Undefined at t = pi/2, where eps says nothing of xbar_0."""
    t = per_sample(t, u)
    return (eps - torch.sin(t) * u) / torch.cos(t)
