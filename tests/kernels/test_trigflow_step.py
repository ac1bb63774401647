from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from tbcm_kernels.trigflow_step import trigflow_step
from torch import Tensor

MODULE = importlib.import_module("tbcm_kernels.trigflow_step")
POINTS = 4
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(
    prompts: int, *shape: int, guided: bool = True, dtype: torch.dtype = torch.float64, device: torch.device
) -> Arguments:
    """F, x, guidance, delta, xs, dxdts: the last two hold -1."""
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(prompts * (1 + guided), *shape, generator=generator, dtype=torch.float64)
    x = 0.5 * torch.randn(prompts, *shape, generator=generator, dtype=torch.float64)
    guidance, delta = torch.rand(2, prompts, generator=generator, dtype=torch.float64)
    xs = torch.full((prompts, POINTS, *shape), -1.0, dtype=torch.float64)
    F, x, guidance, delta, xs = (part.to(device, dtype) for part in (F, x, 4 + guidance, delta, xs))
    return F, x, guidance, delta, xs, xs.clone()


def expected(F: Tensor, x: Tensor, guidance: Tensor, delta: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The following x and dx/dt in fp64, prompt by prompt."""
    prompts = len(x)
    followings, dxdts = np.empty(x.shape), np.empty(x.shape)
    for p in range(prompts):
        answer = F[p].double().cpu().numpy()
        if len(F) != prompts:
            answer = answer + float(guidance[p]) * (F[prompts + p].double().cpu().numpy() - answer)
        dxdts[p] = sigma_data * answer
        angle = float(delta[p])
        followings[p] = np.cos(angle) * x[p].double().cpu().numpy() - np.sin(angle) * dxdts[p]
    return torch.from_numpy(followings), torch.from_numpy(dxdts)


def check(made: Arguments, i: int, sigma_data: float, tolerance: float) -> None:
    F, x, guidance, delta, xs, dxdts = made
    following = trigflow_step(*made, i, sigma_data)
    wanted, velocity = expected(F, x, guidance, delta, sigma_data)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(following.cpu().double(), wanted, **close)
    torch.testing.assert_close(dxdts[:, i].cpu().double(), velocity, **close)
    assert torch.equal(xs[:, i], x)
    others = [n for n in range(POINTS) if n != i]
    assert (xs[:, others] == -1).all() and (dxdts[:, others] == -1).all()
    assert following.dtype == x.dtype
    if x.device.type == "cpu":  # on a card fp64 takes the reference, whose layout is PyTorch's choice
        assert following.is_contiguous()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 3, 4), (1, 1, 1, 1), (2, 5, 21, 10), (1, 2, 16, 32), (0, 2, 3, 4)])
def test_it_is_guidance_and_rotation(kernels: torch.device, shape: tuple[int, ...], guided: bool) -> None:
    check(arguments(*shape, guided=guided, device=kernels), 1, 0.7, 1e-12)


@pytest.mark.parametrize("i", [0, 2, POINTS - 1])
def test_it_writes_the_point_it_is_told_and_no_other(kernels: torch.device, i: int) -> None:
    check(arguments(3, 1, 3, 5, device=kernels), i, 0.5, 1e-12)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_may_answer_in_half_precision(
    kernels: torch.device, dtype: torch.dtype, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "reference", None)
    F, *others = arguments(3, 5, 21, 10, guided=guided, dtype=torch.float32, device=kernels)
    check((F.to(dtype), *others), 1, 0.5, 2e-6)


def test_without_a_kernel_too(kernels: torch.device) -> None:
    made = arguments(2, 2, 3, 4, device=kernels)
    strided = [buffer.transpose(-1, -2).contiguous().transpose(-1, -2) for buffer in made[4:]]
    check((*made[:4], *strided), 1, 0.5, 1e-12)


def test_inputs_may_be_strided(kernels: torch.device) -> None:
    F, x, guidance, delta, *buffers = arguments(2, 2, 3, 4, device=kernels)
    F, x = (part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in (F, x))
    check((F, x, guidance[:1].expand(2), delta[:1].expand(2), *buffers), 1, 0.5, 1e-12)


def test_an_answer_of_another_shape_is_an_error(kernels: torch.device) -> None:
    F, *others = arguments(2, 2, 3, 4, device=kernels)
    for wrong in (F[:3], F[:, :1], F[..., 0]):
        with pytest.raises(ValueError, match="F has a row for each of x, or two"):
            trigflow_step(wrong, *others, 0, 0.5)


def test_a_step_of_no_length_stays(kernels: torch.device) -> None:
    F, x, guidance, delta, *buffers = arguments(2, 2, 3, 4, dtype=torch.float32, device=kernels)
    assert torch.equal(trigflow_step(F, x, guidance, torch.zeros_like(delta), *buffers, 0, 0.5), x)


def test_what_is_not_finite_stays_in_its_prompt(kernels: torch.device) -> None:
    F, *others = arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels)
    F[1], F[0] = torch.nan, 1e30
    following = trigflow_step(F, *others, 1, 0.5)
    assert following[1].isnan().all()
    assert following[[0, 2]].isfinite().all()


def test_two_runs_are_bit_equal(kernels: torch.device) -> None:
    first, second = (arguments(3, 5, 21, 10, dtype=torch.float32, device=kernels) for _ in range(2))
    assert torch.equal(trigflow_step(*first, 1, 0.5), trigflow_step(*second, 1, 0.5))
    assert torch.equal(first[5], second[5])


def test_all_steps_are_one_kernel(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Triton compiles anew for, nothing changes with i."""
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        numbers = [part if not isinstance(part, Tensor) else part.data_ptr() % 16 for part in given]
        launches.append((grid, numbers, constants))

    monkeypatch.setattr(MODULE, "launch", record)
    made = arguments(2, 4, 3, 4, dtype=torch.float32, device=kernels)
    for i in range(POINTS):
        trigflow_step(*made, i, 0.5)
    assert len(launches) == POINTS
    assert all(launch == launches[0] for launch in launches)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kernels: torch.device) -> None:
    compiled = torch.compile(trigflow_step, fullgraph=True, backend="aot_eager")
    eager, graph = (arguments(2, 2, 3, 4, dtype=torch.float32, device=kernels) for _ in range(2))
    for i in (0, 2):
        assert torch.equal(compiled(*graph, i, 0.5), trigflow_step(*eager, i, 0.5))
        assert torch.equal(graph[4], eager[4]) and torch.equal(graph[5], eager[5])


def test_forward_differentiation_by_pytorch(kernels: torch.device) -> None:
    F, x, guidance, delta, *buffers = arguments(2, 2, 3, 4, device=kernels)
    dF, dx = (3 * F).cos(), (3 * x).cos()

    def step(F: Tensor, x: Tensor) -> Tensor:
        return trigflow_step(F, x, guidance, delta, *(torch.zeros_like(buffer) for buffer in buffers), 1, 0.5)

    _, dy = torch.func.jvp(step, (F, x), (dF, dx))
    torch.testing.assert_close(dy, step(F + dF, x + dx) - step(F, x), rtol=1e-10, atol=1e-12)  # the step is linear
