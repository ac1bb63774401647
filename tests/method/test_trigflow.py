from __future__ import annotations

import math

import pytest
import torch
from helpers import Gaussian
from torch import Tensor

from tbcm.method import trigflow as tf

SIGMAS = [0.5, 0.7, 1.0]


def draws(dtype: torch.dtype = torch.float64, t_max: float = 1.55) -> tuple[Tensor, Tensor, Tensor]:
    """Clean sample and unit noise [B, 2, 3, 3], and times [B] inside (0, t_max)."""
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 64, 2, 3, 3, generator=generator, dtype=dtype)
    t = 0.01 + (t_max - 0.01) * torch.rand(64, generator=generator, dtype=dtype)
    return x, e, t


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def test_per_sample_broadcasts_over_everything_but_the_batch() -> None:
    x = torch.ones(3, 2, 4, 5)
    scaled = tf.per_sample(torch.tensor([1.0, 2.0, 3.0]), x) * x
    assert scaled.shape == x.shape
    assert [row.unique().tolist() for row in scaled] == [[1.0], [2.0], [3.0]]
    assert tf.per_sample(torch.ones(3, 1, 1, 1), x).shape == (3, 1, 1, 1)


@pytest.mark.parametrize("sigma_data", SIGMAS)
def test_rotate_is_exact_while_the_end_points_stay_the_same(sigma_data: float) -> None:
    x0, e, t = draws()
    z = sigma_data * e
    x = tf.renoise(x0, z, t)
    torch.testing.assert_close(x, column(t).cos() * x0 + column(t).sin() * z, rtol=0, atol=1e-14)
    dxdt = column(t).cos() * z - column(t).sin() * x0
    earlier = t * torch.linspace(0, 1, len(t), dtype=t.dtype)
    torch.testing.assert_close(tf.rotate(x, dxdt, t - earlier), tf.renoise(x0, z, earlier), rtol=0, atol=1e-14)
    torch.testing.assert_close(tf.rotate(x, dxdt, t), x0, rtol=0, atol=1e-14)


def test_rotation_of_the_exact_consistency_velocity_is_the_flow_map() -> None:
    _, e, t = draws()
    gaussian = Gaussian(mean=-0.3, std=0.8, sigma_data=0.5)
    x = 0.5 * e
    out = tf.rotate(x, 0.5 * gaussian.consistency_F(x / 0.5, t), t)
    torch.testing.assert_close(out, gaussian.flow_map(x, t), rtol=0, atol=1e-13)


def test_flow_times() -> None:
    t = torch.tensor([0.0, math.pi / 4, math.pi / 2, math.atan(3.0)], dtype=torch.float64)
    s = torch.tensor([0.0, 0.5, 1.0, 0.75], dtype=torch.float64)
    torch.testing.assert_close(tf.flow_time(t), s, rtol=0, atol=1e-15)
    torch.testing.assert_close(tf.time_from_flow(s), t, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sigma_data", SIGMAS)
def test_flow_matching_of_a_known_pair(sigma_data: float) -> None:
    """x_s = (1 - s) xbar_0 + s e with velocity e - xbar_0 is the point with F = cos(t) e - sin(t) xbar_0."""
    x, e, t = draws()
    s = tf.flow_time(t)
    x_t = tf.renoise(sigma_data * x, sigma_data * e, t)
    x_s = tf.flow_input(x_t / sigma_data, s)
    torch.testing.assert_close(x_s, (1 - column(s)) * x + column(s) * e, rtol=0, atol=1e-14)
    F = tf.flow_output(x_s, e - x, s)
    torch.testing.assert_close(F, column(t).cos() * e - column(t).sin() * x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sigma_data", SIGMAS)
def test_edm_of_a_known_pair(sigma_data: float) -> None:
    """EDM keeps x_0 as it is: x_sigma = x_0 + sigma e, where the latent itself has standard deviation sigma_d."""
    x0, e, t = draws()
    u = tf.renoise(x0, sigma_data * e, t) / sigma_data
    sigma = tf.edm_sigma(t, sigma_data)
    torch.testing.assert_close(tf.edm_input(u, t, sigma_data), x0 + column(sigma) * e, rtol=1e-13, atol=1e-13)
    F = tf.edm_output(u, x0, t, sigma_data)
    torch.testing.assert_close(F, column(t).cos() * e - column(t).sin() * x0 / sigma_data, rtol=0, atol=1e-12)


def test_variance_preserving_of_a_known_pair() -> None:
    x, e, t = draws()
    alpha = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.99 + 0.01
    sigma = (1 - alpha**2).sqrt()
    t = tf.time_from_vp(alpha, sigma)
    u = column(alpha) * x + column(sigma) * e
    torch.testing.assert_close(tf.renoise(x, e, t), u, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        tf.vp_output_from_eps(u, e, t), column(alpha) * e - column(sigma) * x, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("sigma_data", SIGMAS)
def test_every_formulation_of_one_gaussian_gives_the_same_velocity(sigma_data: float) -> None:
    """Each teacher's own answer is the conditional mean in its own coordinates, by linear regression of jointly
    Gaussian variables: E[a | x] = E a + Cov(a, x) / Var x (x - E x)."""
    mean, std = 0.3 * sigma_data, 0.9 * sigma_data
    _, e, t = draws()
    u = e * 1.3
    expected = Gaussian(mean, std, sigma_data).F(u, t)
    m, q = mean / sigma_data, std / sigma_data  # of xbar_0, for flow matching and variance preserving

    s = tf.flow_time(t)
    x_s, s_ = tf.flow_input(u, s), column(s)
    v = -m + (s_ - (1 - s_) * q**2) / (((1 - s_) * q) ** 2 + s_**2) * (x_s - (1 - s_) * m)
    torch.testing.assert_close(tf.flow_output(x_s, v, s), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tf.flow_velocity(x_s, expected, s), v, rtol=0, atol=1e-12)

    sigma = column(tf.edm_sigma(t, sigma_data))
    denoised = mean + std**2 / (std**2 + sigma**2) * (tf.edm_input(u, t, sigma_data) - mean)
    torch.testing.assert_close(tf.edm_output(u, denoised, t, sigma_data), expected, rtol=0, atol=1e-12)

    alpha, beta = column(t.cos()), column(t.sin())
    standard = (u - alpha * m) / ((alpha * q) ** 2 + beta**2)
    eps, xbar0 = beta * standard, m + alpha * q**2 * standard
    torch.testing.assert_close(tf.vp_output_from_eps(u, eps, t), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha * eps - beta * xbar0, expected, rtol=0, atol=1e-12)  # v-prediction is F


@pytest.mark.parametrize("sigma_data", SIGMAS)
def test_conversions_round_trip_in_single_precision(sigma_data: float) -> None:
    v, e, t = draws(torch.float32, t_max=1.5)
    s = tf.flow_time(t)
    torch.testing.assert_close(tf.time_from_flow(s), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(tf.time_from_edm(tf.edm_sigma(t, sigma_data), sigma_data), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(tf.time_from_vp(t.cos(), t.sin()), t, rtol=0, atol=1e-6)
    x_s = tf.flow_input(e, s)
    torch.testing.assert_close(tf.flow_velocity(x_s, tf.flow_output(x_s, v, s), s), v, rtol=1e-6, atol=1e-6)
    back = tf.edm_input(e, t, sigma_data) * column(t).cos() / sigma_data
    torch.testing.assert_close(back, e, rtol=1e-6, atol=1e-6)


def test_edm_starts_short_of_pi_over_two() -> None:
    t_max = tf.edm_t_max(80.0, 0.5)
    assert t_max == pytest.approx(1.564546, abs=1e-6)  # arctan(160)
    assert float(tf.edm_sigma(torch.tensor(t_max), 0.5)) == pytest.approx(80.0, rel=1e-4)
