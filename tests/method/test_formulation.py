"""Formulations, from what each kind of network is trained to say of a clean latent and a noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tbcm.method.formulation import Diffusion, Edm, Flow, Formulation


def betas(kind: str) -> Tensor:
    """alphas_cumprod of the schedules in use: Stable Diffusion's, and the linear one of DDPM, DiT and PixArt."""
    if kind == "scaled":
        return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    return torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)


def points(formulation: Formulation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean latent, noise, u and t, fp64."""
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 32, 3, 2, 2, generator=generator, dtype=torch.float64)
    span = formulation.t_max - formulation.t_min
    t = formulation.t_min + span * (0.01 + 0.98 * torch.rand(32, generator=generator, dtype=torch.float64))
    wide = t[:, None, None, None]
    return x, e, wide.cos() * x + wide.sin() * e, t


def check(formulation: Formulation, answer: Tensor, e: Tensor, x: Tensor, u: Tensor, t: Tensor) -> None:
    wide = t[:, None, None, None]
    F = wide.cos() * e - wide.sin() * x
    torch.testing.assert_close(formulation.output(u, t, answer), F, rtol=0, atol=1e-9)
    torch.testing.assert_close(formulation.native(u, t, F), answer, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("scale", "reverse", "shift"), [(1000.0, False, 1.0), (1.0, True, 1.0), (1000.0, False, 3.0)])
def test_flow(sign: int, scale: float, reverse: bool, shift: float) -> None:
    formulation = Flow(scale, reverse, sign, shift)
    x, e, u, t = points(formulation)
    s = t.sin() / (t.sin() + t.cos())
    x_s = (1 - s)[:, None, None, None] * x + s[:, None, None, None] * e
    torch.testing.assert_close(formulation.input(u, t), x_s, rtol=0, atol=1e-12)
    q = formulation.time(t) / scale
    q = 1 - q if reverse else q
    torch.testing.assert_close(shift * q / (1 + (shift - 1) * q), s, rtol=0, atol=1e-12)
    check(formulation, sign * (e - x), e, x, u, t)


@pytest.mark.parametrize("kind", ["scaled", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion(kind: str, prediction: str) -> None:
    abar = betas(kind)
    formulation = Diffusion(abar, prediction)  # type: ignore[arg-type]
    x, e, u, t = points(formulation)
    wide = t[:, None, None, None]
    answers = {"epsilon": e, "v_prediction": wide.cos() * e - wide.sin() * x, "sample": x}
    check(formulation, answers[prediction], e, x, u, t)
    torch.testing.assert_close(formulation.input(u, t), u)
    knots = torch.atan2((1 - abar).sqrt(), abar.sqrt())
    torch.testing.assert_close(formulation.time(knots), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)
    assert formulation.t_min == float(knots[0]) and formulation.t_max == float(knots[-1])


def test_the_index_between_the_knots_is_smooth_and_rises() -> None:
    formulation = Diffusion(betas("scaled"))
    t = torch.linspace(formulation.t_min, formulation.t_max, 20001, dtype=torch.float64)[1:-1]
    k, slope = torch.func.jvp(formulation.time, (t,), (torch.ones_like(t),))
    h = 1e-7
    difference = (formulation.time(t + h) - formulation.time(t - h)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-3)
    assert (slope > 0).all() and (k.diff() > 0).all()
    assert float((slope.diff() / slope[1:]).abs().max()) < 0.05, "the slope jumps"


def test_below_the_first_knot_the_index_is_held_and_fp32_is_exact_at_the_last() -> None:
    formulation = Diffusion(betas("scaled"))
    assert formulation.time(torch.tensor([0.0, 0.01])).tolist() == [0.0, 0.0]
    last = torch.tensor([formulation.t_max])
    torch.testing.assert_close(formulation.time(last), torch.tensor([999.0]), rtol=0, atol=1e-3)
    _, slope = torch.func.jvp(formulation.time, (last,), (torch.ones(1),))
    assert float(slope) > 100, "generation starts here: the derivative in t must not be cut off by rounding"


def test_eps_of_pure_noise_is_refused() -> None:
    abar = torch.cat([betas("scaled"), torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="says nothing of the image"):
        Diffusion(abar, "epsilon")
    assert Diffusion(abar, "v_prediction").t_max == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm(prediction: str) -> None:
    """Karras et al. 2022, Tab. 1: D = c_skip x_sigma + c_out N."""
    formulation = Edm(0.002, 80.0, 0.5, prediction)  # type: ignore[arg-type]
    x, e, u, t = points(formulation)
    sigma = 0.5 * t.tan()[:, None, None, None]
    x_sigma = 0.5 * x + sigma * e
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt() * (1 if prediction == "epsilon" else -1)
    torch.testing.assert_close(formulation.input(u, t), x_sigma / (sigma**2 + 0.25).sqrt(), rtol=0, atol=1e-9)
    torch.testing.assert_close(formulation.time(t), (sigma[:, 0, 0, 0]).log() / 4, rtol=0, atol=1e-9)
    check(formulation, (0.5 * x - c_skip * x_sigma) / c_out, e, x, u, t)


@pytest.mark.parametrize("formulation", [Flow(sampling_shift=3.0), Diffusion(betas("scaled")), Edm()])
def test_schedules_descend_from_t_max(formulation: Formulation) -> None:
    for steps in (1, 4, 20):
        times = formulation.schedule(steps)
        assert times.shape == (steps,) and (times.diff() < 0).all() and float(times[-1]) > 0
        assert float(times[0]) == pytest.approx(formulation.t_max, abs=1e-6)
