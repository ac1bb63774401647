from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from tbcm_kernels.consistency_loss import consistency_loss
from torch import Tensor

MODULE = importlib.import_module("tbcm_kernels.consistency_loss")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
SHAPES = [(5, 2, 3, 4), (1, 1, 1, 1), (3, 5, 21, 10), (130, 1, 2, 1), (1, 1, 67_003, 1)]
"""Of one chunk and of two, of more samples than one round of the last kernel takes, of larger chunks."""


def arguments(batch: int, *shape: int, dtype: torch.dtype = torch.float64, device: torch.device) -> Arguments:
    """F, g, logvar, t, keep: every third sample is dropped, from the second."""
    generator = torch.Generator().manual_seed(0)
    F, g = torch.randn(2, batch, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
    logvar = torch.randn(batch, generator=generator, dtype=torch.float64).to(device, dtype)
    t = (0.05 + 1.5 * torch.rand(batch, generator=generator, dtype=torch.float64)).to(device, dtype)
    keep = torch.arange(batch, device=device) % 3 != 1
    return F.requires_grad_(), g / math.prod(shape) ** 0.5, logvar.requires_grad_(), t, keep


def expected(made: Arguments, count: int, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, error and the gradients to F and logvar in fp64, from the formula's value, which is that of -g."""
    g, logvar, t, kept = (part.detach().double() for part in made[1:])
    error = kept * g.square().flatten(1).sum(1) / max(1, g[:1].numel())
    scale = (-logvar).exp() / (sigma_data * t.tan())
    loss = (kept * (scale * error + logvar)).sum() / count
    dF = -2 * (kept * scale / (max(1, g[:1].numel()) * count))[:, None, None, None] * g
    return loss, error, dF, kept * (1 - scale * error) / count


def check(made: Arguments, count: int, sigma_data: float, tolerance: float, half: float | None = None) -> None:
    loss, error = consistency_loss(*made, count, sigma_data)
    assert loss.shape == () and loss.dtype == error.dtype == made[1].dtype
    assert not error.requires_grad
    found = loss, error, *torch.autograd.grad(loss, (made[0], made[2]))
    assert found[2].dtype == made[0].dtype and found[3].dtype == made[2].dtype
    wanted = expected(made, count, sigma_data)
    tolerances = tolerance, tolerance, half or tolerance, half or tolerance
    for a, b, rtol in zip(found, wanted, tolerances, strict=True):
        scale = float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_and_its_gradient_are_the_formulas(kernels: torch.device, shape: tuple[int, ...]) -> None:
    check(arguments(*shape, device=kernels), 7, 0.7, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prediction_and_log_variance_may_be_of_half_precision(
    kernels: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "reference", None)
    F, g, logvar, t, keep = arguments(5, 5, 21, 10, dtype=torch.float32, device=kernels)
    F, logvar = (part.detach().to(dtype).requires_grad_() for part in (F, logvar))
    check((F, g, logvar, t, keep), 15, 0.5, 2e-6, half={torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype))


def test_without_a_kernel_too(kernels: torch.device) -> None:
    F, g, logvar, t, keep = arguments(5, 2, 3, 4, device=kernels)
    loss, error = consistency_loss(F, g, logvar, t.float(), keep, 15, 0.5)
    wanted = expected((F, g, logvar, t.float(), keep), 15, 0.5)
    torch.testing.assert_close((loss.detach(), error), wanted[:2], rtol=1e-6, atol=1e-6)


def test_its_gradient_agrees_with_finite_differences(kernels: torch.device) -> None:
    """The loss falls along F as it does along -g, which it is a function of in value."""
    F, g, logvar, t, keep = arguments(4, 2, 3, 4, device=kernels)
    along, h = g.cos(), 1e-5
    loss, _ = consistency_loss(F, g, logvar, t, keep, 15, 0.5)
    dF, dlogvar = torch.autograd.grad(loss, (F, logvar))
    above, below = (consistency_loss(F, g - step * along, logvar, t, keep, 15, 0.5)[0] for step in (h, -h))
    torch.testing.assert_close((dF * along).sum(), (above - below).detach() / (2 * h), rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradcheck(lambda logvar: consistency_loss(F, g, logvar, t, keep, 15, 0.5)[0], logvar)
    assert dlogvar[keep].abs().min() > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dropped_samples_contribute_exactly_nothing(kernels: torch.device, poison: float) -> None:
    F, g, logvar, t, keep = arguments(5, 5, 21, 10, dtype=torch.float32, device=kernels)
    clean, _ = consistency_loss(F, g, logvar, t, keep, 15, 0.5)
    with torch.no_grad():
        for part in (F, g, logvar):
            part[~keep] = poison
    loss, error = consistency_loss(F, g, logvar, t, keep, 15, 0.5)
    dF, dlogvar = torch.autograd.grad(loss, (F, logvar))
    assert torch.equal(loss, clean)
    for part in (error, dF, dlogvar):
        assert (part[~keep] == 0).all() and (part[keep] != 0).all()


def test_a_kept_sample_that_is_not_a_number_shows(kernels: torch.device) -> None:
    F, g, logvar, t, keep = arguments(5, 5, 21, 10, dtype=torch.float32, device=kernels)
    g[0, 4, 20, 9] = torch.nan
    loss, error = consistency_loss(F, g, logvar, t, keep, 15, 0.5)
    (dF,) = torch.autograd.grad(loss, F)
    assert loss.isnan() and error[0].isnan() and dF[0].isnan().any()
    assert error[1:].isfinite().all() and dF[1:].isfinite().all()


@pytest.mark.parametrize("batch", [0, 3])
def test_nothing_that_is_kept_is_nothing(kernels: torch.device, batch: int) -> None:
    F, g, logvar, t, keep = arguments(batch, 2, 3, 4, device=kernels)
    loss, error = consistency_loss(F, g, logvar, t, torch.zeros_like(keep), 15, 0.5)
    for part in (loss, error, *torch.autograd.grad(loss, (F, logvar))):
        assert (part == 0).all()


def test_extreme_samples(kernels: torch.device) -> None:
    """At t = pi/2, which fp32 rounds up, the weight is 0 and not below; a tangent of 0 has an error of 0."""
    F, g, logvar, t, keep = arguments(4, 5, 21, 10, dtype=torch.float32, device=kernels)
    keep = torch.ones_like(keep)
    t[0], t[1] = math.pi / 2, 1e-4
    g[2] = 0.0
    with torch.no_grad():
        logvar[3] = 60.0
    loss, error = consistency_loss(F, g, logvar, t, keep, 1, 0.5)
    dF, dlogvar = torch.autograd.grad(loss, (F, logvar))
    assert all(part.isfinite().all() for part in (loss, error, dF, dlogvar))
    assert (dF[[0, 2]] == 0).all() and (dlogvar[[0, 2, 3]] == 1).all() and error[2] == 0


def test_the_gradient_scales_with_what_is_made_of_the_loss(kernels: torch.device) -> None:
    F, g, logvar, t, keep = arguments(5, 2, 3, 4, device=kernels)
    once, thrice = (
        torch.autograd.grad(factor * consistency_loss(F, g, logvar, t, keep, 15, 0.5)[0], (F, logvar))
        for factor in (1.0, 3.0)
    )
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_inputs_may_be_strided(kernels: torch.device) -> None:
    made = arguments(5, 2, 3, 4, device=kernels)
    leaves = [torch.stack([part.detach()] * 2, 1).requires_grad_(part.requires_grad) for part in made]
    loss, _ = consistency_loss(*(leaf[:, 0] for leaf in leaves), 15, 0.5)
    loss.backward()
    wanted, _, dF, dlogvar = expected(made, 15, 0.5)
    torch.testing.assert_close((loss, leaves[0].grad[:, 0], leaves[2].grad[:, 0]), (wanted, dF, dlogvar))


def test_parts_of_a_batch_add_up_to_the_whole(kernels: torch.device) -> None:
    made = arguments(5, 2, 3, 4, device=kernels)
    parts = (tuple(part[rows] for part in made) for rows in (slice(0, 1), slice(1, 2), slice(2, 5)))
    total = sum(consistency_loss(*part, 15, 0.5)[0] for part in parts)
    torch.testing.assert_close(total, consistency_loss(*made, 15, 0.5)[0])


def test_two_runs_are_bit_equal(kernels: torch.device) -> None:
    made = arguments(5, 5, 21, 10, dtype=torch.float32, device=kernels)
    runs = []
    for _ in range(2):
        loss, error = consistency_loss(*made, 15, 0.5)
        runs.append((loss, error, *torch.autograd.grad(loss, (made[0], made[2]))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_another_count_is_the_same_kernel(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for some integers and every constant, and for no float."""
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        launches.append((kernel, grid, [part for part in given if type(part) is int], constants))

    monkeypatch.setattr(MODULE, "launch", record)
    made = arguments(2, 4, 3, 4, dtype=torch.float32, device=kernels)
    for count in (1, 15, 16):
        consistency_loss(*made, count, 0.5)[0].backward()
    assert len(launches) == 9
    assert launches[:3] == launches[3:6] == launches[6:]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kernels: torch.device) -> None:
    made = arguments(5, 5, 21, 10, dtype=torch.float32, device=kernels)
    runs = []
    for function in (consistency_loss, torch.compile(consistency_loss, fullgraph=True, backend="aot_eager")):
        loss, error = function(*made, 15, 0.5)
        runs.append((loss, error, *torch.autograd.grad(loss, (made[0], made[2]))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_forward_differentiation_by_pytorch(kernels: torch.device) -> None:
    F, g, logvar, t, keep = arguments(4, 2, 3, 4, device=kernels)
    dlogvar = t.cos()
    _, derivative = torch.func.jvp(
        lambda logvar: consistency_loss(F.detach(), g, logvar, t, keep, 15, 0.5)[0], (logvar.detach(),), (dlogvar,)
    )
    torch.testing.assert_close(derivative, (expected((F, g, logvar, t, keep), 15, 0.5)[3] * dlogvar).sum())
