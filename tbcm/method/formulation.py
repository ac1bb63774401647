"""What a teacher was trained as, in TrigFlow coordinates: flow matching, discrete diffusion, or EDM (paper Tab. 1).

A network is not given (u, t) but its own input and time, and answers in its own terms. A `Formulation` is that change
of variables, exact, elementwise and differentiable in u and t, and the range of t in which it means anything:

    u = x_t / sigma_d = cos(t) xbar_0 + sin(t) e,    xbar_0 the clean latent at the scale of std about 1,  e ~ N(0, I)
    F = cos(t) e - sin(t) xbar_0                     (what TrigFlow asks of a network)

Times are [B] tensors in radians, u and answers [B, ...] of the same shape; dtypes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tbcm.method.trigflow import (
    T_MAX,
    flow_input,
    flow_output,
    flow_time,
    flow_velocity,
    per_sample,
    time_from_flow,
    time_from_vp,
    vp_output_from_eps,
)

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Formulation(Protocol):
    """`t_max` is where generation starts; below `t_min` the teacher has not been trained."""

    @property
    def t_min(self) -> float: ...

    @property
    def t_max(self) -> float: ...

    def time(self, t: Tensor) -> Tensor:
        """What the network is given as its time."""
        ...

    def input(self, u: Tensor, t: Tensor) -> Tensor:
        """What the network is given as its sample."""
        ...

    def output(self, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        """The network's answer as F."""
        ...

    def native(self, u: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """The inverse of `output`: the answer that would mean F."""
        ...

    def schedule(self, steps: int) -> Tensor:
        """The teacher's own sampling times [steps], descending from t_max (0 not included)."""
        ...

    def at(self, tokens: int) -> Formulation:
        """That of images of so many tokens."""
        ...


@dataclass(frozen=True)
class Flow:
    """Flow matching: x_s = (1 - s) xbar_0 + s e; the network answers sign (e - xbar_0).

    Args:
        scale: the network's time at s = 1.
        reverse: its time is scale (1 - s): it counts from noise to data.
        sign: -1 where it answers xbar_0 - e.
        shift: 1, but where the network is given the time q *before* its schedule's shift (CogView4):
            s = shift q / (1 + (shift - 1) q).
        sampling_shift: of the schedule that the teacher is sampled with; its network need not know it.
        shift_of: both shifts as a function of the number of an image's tokens, where they depend on it.
    """

    scale: float = 1000.0
    reverse: bool = False
    sign: int = 1
    shift: float = 1.0
    sampling_shift: float = 1.0
    shift_of: Callable[[int], float] | None = None

    t_min = 0.0
    t_max = T_MAX

    def time(self, t: Tensor) -> Tensor:
        s = flow_time(t)
        q = s / (self.shift - (self.shift - 1) * s)
        return self.scale * (1 - q if self.reverse else q)

    def input(self, u: Tensor, t: Tensor) -> Tensor:
        return flow_input(u, flow_time(t))

    def output(self, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        return flow_output(self.input(u, t), self.sign * answer, flow_time(t))

    def native(self, u: Tensor, t: Tensor, F: Tensor) -> Tensor:
        return self.sign * flow_velocity(self.input(u, t), F, flow_time(t))

    def schedule(self, steps: int) -> Tensor:
        q = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        return time_from_flow(self.sampling_shift * q / (1 + (self.sampling_shift - 1) * q)).float()

    def at(self, tokens: int) -> Flow:
        if self.shift_of is None:
            return self
        shift = self.shift_of(tokens)
        return Flow(self.scale, self.reverse, self.sign, shift, shift)


class Diffusion:
    """Discrete-time diffusion with a table of abar_k = alpha_k^2, k = 0 .. K-1: x = u, t_k = atan2(sigma_k, alpha_k).

    The network's time is the index k, continued between the t_k by a cubic Hermite curve (once differentiable, exact in
    the t_k), and held at 0 below t_0 = t_min.

    Raises:
        ValueError: an eps-prediction whose last abar is 0: it says nothing of the image there.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction = "epsilon") -> None:
        abar = alphas_cumprod.detach().to("cpu", torch.float64).clamp(0, 1)
        knots = time_from_vp(abar.sqrt(), (1 - abar).sqrt())
        if prediction == "epsilon" and knots[-1] > T_MAX - 1e-4:
            raise ValueError(
                "its schedule ends in pure noise (zero terminal SNR) and it predicts eps, which says nothing of the"
                " image there; such a teacher must predict v"
            )
        index = torch.arange(len(knots), dtype=torch.float64)
        self.prediction = prediction
        self.t_min, self.t_max = float(knots[0]), float(knots[-1])
        self._tables = {torch.device("cpu"): (knots, torch.gradient(index, spacing=(knots,))[0])}

    def knot(self, index: int) -> float:
        """t_k."""
        return float(self._tables[torch.device("cpu")][0][index])

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_k = cos(t_k)^2, [K] fp64."""
        return self._tables[torch.device("cpu")][0].cos().square()

    def __len__(self) -> int:
        return len(self._tables[torch.device("cpu")][0])

    def time(self, t: Tensor) -> Tensor:
        knots, slopes = self._on(t.device)
        angle = t.double().clamp(min=self.t_min)
        i = torch.searchsorted(knots, angle.detach(), right=True).clamp(1, len(knots) - 1) - 1
        width = knots[i + 1] - knots[i]
        p = (angle - knots[i]) / width
        bend = width * p * (1 - p) * (slopes[i] * (1 - p) - slopes[i + 1] * p)
        return (i + p * p * (3 - 2 * p) + bend).to(t.dtype)

    def input(self, u: Tensor, t: Tensor) -> Tensor:
        return u

    def output(self, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        return _output(self.prediction, u, t, answer)

    def native(self, u: Tensor, t: Tensor, F: Tensor) -> Tensor:
        return _native(self.prediction, u, t, F)

    def schedule(self, steps: int) -> Tensor:
        """Even in the index, from the last one ("trailing")."""
        last = len(self) - 1
        index = torch.linspace(last, -1, steps + 1, dtype=torch.float64)[:-1].round().long().clamp(min=0)
        return self._tables[torch.device("cpu")][0][index].float()

    def at(self, tokens: int) -> Diffusion:
        return self

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The knots and dk/dt there. Copied to a device once, since a copy from host memory waits for it."""
        if device not in self._tables:
            knots, slopes = self._tables[torch.device("cpu")]
            self._tables[device] = knots.to(device), slopes.to(device)
        return self._tables[device]


@dataclass(frozen=True)
class Edm:
    """EDM (Karras et al. 2022) with its preconditioning: x_sigma = x_0 + sigma n, sigma = sigma_data tan t.

    The network is given c_in x_sigma, which is u, and c_noise = log(sigma) / 4; its answer N makes the denoiser
    D = c_skip x_sigma + c_out N, so that F = -N with c_out > 0 ("epsilon") and F = N with c_out < 0 ("v_prediction").
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    prediction: Prediction = "epsilon"

    @property
    def t_min(self) -> float:
        return math.atan(self.sigma_min / self.sigma_data)

    @property
    def t_max(self) -> float:
        """Short of pi/2, whose tangent means nothing in fp32."""
        return math.atan(self.sigma_max / self.sigma_data)

    def time(self, t: Tensor) -> Tensor:
        return 0.25 * torch.log(self.sigma_data * torch.tan(t.clamp(min=self.t_min)))

    def input(self, u: Tensor, t: Tensor) -> Tensor:
        return u

    def output(self, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        return -answer if self.prediction == "epsilon" else answer

    def native(self, u: Tensor, t: Tensor, F: Tensor) -> Tensor:
        return self.output(u, t, F)

    def schedule(self, steps: int) -> Tensor:
        """Karras' spacing, rho = 7."""
        ends = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        sigma = torch.linspace(*ends, steps, dtype=torch.float64) ** 7
        return torch.atan(sigma / self.sigma_data).float()

    def at(self, tokens: int) -> Edm:
        return self


def _output(prediction: Prediction, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
    if prediction == "v_prediction":
        return answer
    if prediction == "epsilon":
        return vp_output_from_eps(u, answer, t)
    t = per_sample(t, u)
    return (torch.cos(t) * u - answer) / torch.sin(t)


def _native(prediction: Prediction, u: Tensor, t: Tensor, F: Tensor) -> Tensor:
    if prediction == "v_prediction":
        return F
    t = per_sample(t, u)
    if prediction == "epsilon":
        return torch.sin(t) * u + torch.cos(t) * F
    return torch.cos(t) * u - torch.sin(t) * F
