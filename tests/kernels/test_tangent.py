from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from tbcm_kernels.tangent import tangent
from torch import Tensor

MODULE = importlib.import_module("tbcm_kernels.tangent")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(batch: int, *shape: int, dtype: torch.dtype = torch.float64, device: torch.device) -> Arguments:
    """F, dF, x, dx/dt, t."""
    generator = torch.Generator().manual_seed(0)
    F, dF, x, dxdt = torch.randn(4, batch, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
    t = torch.rand(batch, generator=generator, dtype=torch.float64).to(device, dtype) * math.pi / 2
    return F, dF, x, dxdt, t


def expected(made: Arguments, r: float, sigma_data: float, c: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 in fp64, sample by sample."""
    F, dF, x, dxdt, t = (part.double().cpu().numpy() for part in made)
    g, norm = np.empty(x.shape), np.empty(t.shape)
    for b, angle in enumerate(t):
        cos, sin = math.cos(angle), math.sin(angle)
        g[b] = -cos * cos * (sigma_data * F[b] - dxdt[b]) - r * (cos * sin * x[b] + sigma_data * dF[b])
        norm[b] = math.sqrt((g[b] ** 2).sum())
        g[b] /= norm[b] + c
    return torch.from_numpy(g), torch.from_numpy(norm)


def check(made: Arguments, r: float, sigma_data: float, c: float, tolerance: float) -> None:
    g, norm = tangent(*made, r, sigma_data, c)
    wanted, length = expected(made, r, sigma_data, c)
    torch.testing.assert_close(
        g.cpu().double(), wanted, rtol=tolerance, atol=tolerance / math.sqrt(max(1, g[:1].numel()))
    )
    torch.testing.assert_close(norm.cpu().double(), length, rtol=tolerance, atol=0)
    assert g.dtype == norm.dtype == made[2].dtype and g.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 2, 3, 4), (1, 1, 1, 1), (2, 5, 21, 10), (1, 2, 16, 32), (1, 1, 67_003, 1)])
def test_it_is_algorithm_1(kernels: torch.device, shape: tuple[int, ...]) -> None:
    check(arguments(*shape, device=kernels), 0.3, 0.7, 0.1, 1e-12)


@pytest.mark.parametrize("r", [0.0, 1.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_at_all_settings(kernels: torch.device, r: float, sigma_data: float, c: float) -> None:
    check(arguments(2, 2, 3, 4, device=kernels), r, sigma_data, c, 1e-12)


def test_an_empty_batch(kernels: torch.device) -> None:
    g, norm = tangent(*arguments(0, 2, 3, 4, device=kernels), 1.0, 0.5)
    assert g.shape == (0, 2, 3, 4) and norm.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_may_answer_in_half_precision(
    kernels: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "reference", None)
    F, dF, *others = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    check((F.to(dtype), dF.to(dtype), *others), 0.75, 0.5, 0.1, 5e-6)


def test_without_a_kernel_too(kernels: torch.device) -> None:
    F, dF, x, dxdt, t = arguments(3, 2, 3, 4, device=kernels)
    g, norm = tangent(F, dF, x.float(), dxdt, t, 0.75, 0.5)
    wanted, length = expected((F, dF, x.float(), dxdt, t), 0.75, 0.5, 0.1)
    torch.testing.assert_close((g.cpu(), norm.cpu()), (wanted, length), rtol=1e-12, atol=1e-12)


def test_inputs_may_be_strided(kernels: torch.device) -> None:
    """x and dx/dt of training are points of trajectories, without the first."""
    F, dF, x, dxdt, t = arguments(6, 2, 3, 4, device=kernels)
    spaced = [torch.stack([part, part], 1)[:, 0] for part in (F, dF, x, dxdt)]
    check((*spaced, torch.stack([t, t], 1)[:, 0]), 0.75, 0.5, 0.1, 1e-12)


def test_a_sample_does_not_depend_on_its_batch(kernels: torch.device) -> None:
    made = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    g, norm = tangent(*made, 0.75, 0.5)
    for b in range(3):
        alone, length = tangent(*(part[b : b + 1] for part in made), 0.75, 0.5)
        assert torch.equal(alone[0], g[b]) and torch.equal(length[0], norm[b])


def test_two_runs_are_bit_equal(kernels: torch.device) -> None:
    made = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    for first, second in zip(tangent(*made, 0.75, 0.5), tangent(*made, 0.75, 0.5), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of squares, by the interpreter
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e25])
def test_extreme_samples_have_a_tangent_no_longer_than_one(kernels: torch.device, scale: float) -> None:
    *made, t = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    g, norm = tangent(*(part * scale for part in made), t, 1.0, 0.5)
    assert g.isfinite().all()
    assert not norm.isnan().any()
    assert (g.flatten(1).norm(dim=1) <= 1 + 1e-5).all()
    if scale == 0.0:
        assert (g == 0).all() and (norm == 0).all()


def test_what_is_not_finite_stays_in_its_sample(kernels: torch.device) -> None:
    made = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    g, norm = tangent(*made, 0.75, 0.5)
    made[1][1, 4, 20, 9] = torch.nan
    poisoned, length = tangent(*made, 0.75, 0.5)
    assert poisoned[1].isnan().all() and length[1].isnan()
    assert torch.equal(poisoned[[0, 2]], g[[0, 2]]) and torch.equal(length[[0, 2]], norm[[0, 2]])


def test_it_has_no_graph(kernels: torch.device) -> None:
    made = [part.requires_grad_() for part in arguments(2, 2, 3, 4, device=kernels)]
    assert not any(part.requires_grad for part in tangent(*made, 0.75, 0.5))


def test_another_r_is_the_same_kernel(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for some integers and every constant, and for no float."""
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        launches.append((kernel, grid, [part for part in given if type(part) is int], constants))

    monkeypatch.setattr(MODULE, "launch", record)
    made = arguments(2, 4, 3, 4, dtype=torch.float32, device=kernels)
    for r in (0.0, 0.3, 1.0):
        tangent(*made, r, 0.5)
    assert len(launches) == 6
    assert launches[:2] == launches[2:4] == launches[4:]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kernels: torch.device) -> None:
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    made = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    for graph, eager in zip(compiled(*made, 0.75, 0.5), tangent(*made, 0.75, 0.5), strict=True):
        assert torch.equal(graph, eager)


def test_forward_differentiation_by_pytorch(kernels: torch.device) -> None:
    made, h = arguments(2, 2, 3, 4, device=kernels), 1e-6
    moved = tuple((3 * part).cos() for part in made)

    def at(step: float) -> tuple[Tensor, Tensor]:
        return tangent(*(part + step * along for part, along in zip(made, moved, strict=True)), 0.75, 0.5)

    _, derivatives = torch.func.jvp(lambda *values: tangent(*values, 0.75, 0.5), made, moved)
    for derivative, above, below in zip(derivatives, at(h), at(-h), strict=True):
        torch.testing.assert_close(derivative, (above - below) / (2 * h), rtol=1e-7, atol=1e-7)
