from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from came_by_the_book import CameByTheBook
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tbcm.errors import UserError
from tbcm.runtime import came
from tbcm.runtime.ema import EMA
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step

SHAPES = [(), (5,), (7, 5), (5, 7), (7, 5), (1, 1)]  # one twice: updated as one stack
SHAPES += [(6, 4, 1, 1), (6, 1, 1, 1), (6, 4, 3, 3), (6, 1, 3, 3), (8, 4, 2, 2), (6, 4, 3)]
"""Convolutions: 1 x 1, depthwise 1 x 1, 3 x 3, depthwise 3 x 3, a patch embedding, in one dimension."""
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=random).to(param.dtype) * 10.0 ** (step % 3 - 2)


def snapshot(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value.clone() for param in params for value in optimizer.state[param].values()]
    return [param.detach().clone() for param in params] + state


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("stack_elements", [2**24, 40])
def test_came_follows_the_paper(
    dtype: torch.dtype, tolerance: float, weight_decay: float, stack_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(came, "_STACK_ELEMENTS", stack_elements)
    params = parameters(dtype)
    books = [CameByTheBook(param.detach().double().numpy().copy(), 1e-2, weight_decay) for param in params]
    optimizer = build_optimizer("came", params, lr=1e-2, weight_decay=weight_decay)
    for step in range(50):
        set_gradients(params, step)
        gated_step(optimizer, FINITE)
        for param, book in zip(params, books, strict=True):
            assert param.grad is not None
            expected = book.step(param.grad.double().numpy())
            np.testing.assert_allclose(param.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_came_survives_rows_without_gradient() -> None:
    """An unused embedding row squares to 0: only eps is left, and products of two such numbers underflow in fp32."""
    param = torch.nn.Parameter(torch.ones(4, 3))
    zero = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer("came", [param, zero], lr=1e-2)
    for _ in range(3):
        param.grad = torch.tensor([[1.0], [0.0], [0.0], [2.0]]).expand(4, 3).clone()
        zero.grad = torch.zeros(4, 3)
        gated_step(optimizer, FINITE)
    assert param.isfinite().all()
    assert torch.equal(param[1:3], torch.ones(2, 3))
    assert (param[0] < 1).all()
    assert torch.equal(zero, torch.ones(4, 3))


def test_came_without_any_instability_divides_by_its_eps() -> None:
    """With b1 = 0 the momentum is the update: S = (1 - b3) eps2, and a clipped update of ones moves by lr / sqrt(S)."""
    param = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    gated_step(build_optimizer("came", [param], lr=3e-11, betas=(0, 0.999, 0.9999), eps=(1e-30, 1e-16)), FINITE)
    torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - 3e-11 / (1e-4 * 1e-16) ** 0.5))


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((8, 4), 8 + 4),
        ((8, 4, 1, 1), 8 + 4),
        ((8, 1, 3, 3), None),
        ((8, 4, 2, 2), None),
        ((8, 4, 1, 3), None),
        ((8, 4, 1), None),
        ((8,), None),
    ],
)
def test_came_factors_matrices_and_convolutions_of_one_by_one(shape: tuple[int, ...], numbers: int | None) -> None:
    param = torch.nn.Parameter(torch.zeros(shape))
    state = build_optimizer("came", [param], lr=1.0).state[param]
    second_moments = param.numel() if numbers is None else 2 * numbers  # with the instability's
    assert sum(value.numel() for value in state.values()) == param.numel() + second_moments


@pytest.mark.parametrize("kind", ["depthwise", "patch embedding"])
def test_came_moves_a_convolution_by_its_learning_rate(kind: str) -> None:
    """Without a step of confidence an update has a root mean square of 1 at most. Factored as [out, in * 9] and divided
    by its instability this one went 35 times as far."""
    shape = {"depthwise": (64, 1, 3, 3), "patch embedding": (64, 4, 2, 2)}[kind]
    param, random = torch.nn.Parameter(torch.zeros(shape)), torch.Generator().manual_seed(0)
    optimizer = build_optimizer("came", [param], lr=1.0)
    for _ in range(50):
        before = param.detach().clone()
        param.grad = 1 + torch.randn(shape, generator=random)
        gated_step(optimizer, FINITE)
        assert (param.detach() - before).square().mean().sqrt() <= 1 + 1e-5


def test_came_takes_weights_in_another_order_of_memory_and_empty_ones() -> None:
    random = torch.Generator().manual_seed(0)
    value, gradient = (torch.randn(6, 4, 3, 3, generator=random) for _ in range(2))
    outcomes = []
    for order in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(value.to(memory_format=order, copy=True))
        empty = torch.nn.Parameter(torch.zeros(0, 3))
        param.grad, empty.grad = gradient.to(memory_format=order), torch.zeros(0, 3)
        optimizer = build_optimizer("came", [param, empty], lr=1e-2, weight_decay=0.1)
        gated_step(optimizer, FINITE)
        assert all(state.isfinite().all() for state in optimizer.state[empty].values())
        outcomes.append(snapshot([param], optimizer))
    assert equal(*outcomes)
    assert not torch.equal(outcomes[0][0], value)


def test_came_refuses_half_precision_weights() -> None:
    with pytest.raises(UserError, match="float32"):
        build_optimizer("came", parameters(torch.bfloat16), lr=1e-3)


def test_came_honours_a_gradient_scaler_without_unscaling() -> None:
    plain, scaled = parameters(), parameters()
    optimizers: list[Any] = [build_optimizer("came", params, lr=1e-2) for params in (plain, scaled)]
    for step in range(3):
        set_gradients(plain, step)
        set_gradients(scaled, step)
        for param in scaled:
            assert param.grad is not None
            param.grad *= 1024
        optimizers[1].grad_scale = torch.tensor(1024.0)
        for optimizer in optimizers:
            optimizer.step()
    assert equal(snapshot(plain, optimizers[0]), snapshot(scaled, optimizers[1]))


ARMS = [("adamw", torch.float32), ("adamw", torch.bfloat16), ("came", torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), ARMS)
@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_is_as_if_it_had_not_been(name: str, dtype: torch.dtype, bad_step: int, bad: float) -> None:
    with_bad, without = parameters(dtype), parameters(dtype)
    optimizers = [build_optimizer(name, params, lr=1e-2, weight_decay=0.1) for params in (with_bad, without)]
    for step in range(6):
        if step == bad_step:
            before = snapshot(with_bad, optimizers[0])
            set_gradients(with_bad, 50)
            gradient = with_bad[2].grad
            assert gradient is not None
            gradient[1, 1] = bad
            norm, finite = clip_and_check(with_bad, 0.1)
            assert not finite
            assert not norm.isfinite()
            gated_step(optimizers[0], finite)
            assert equal(before, snapshot(with_bad, optimizers[0]))
        for params, optimizer in zip((with_bad, without), optimizers, strict=True):
            set_gradients(params, step)
            _, finite = clip_and_check(params, 0.1)
            assert finite
            gated_step(optimizer, finite)
    assert equal(snapshot(with_bad, optimizers[0]), snapshot(without, optimizers[1]))
    assert not equal([*parameters(dtype)], [*without])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = build_optimizer("adamw", ours, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6, fused=True)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        gated_step(optimizer, FINITE)
        reference.step()
    assert equal(snapshot(ours, optimizer), snapshot(theirs, reference))


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_parameters_without_gradient_stay(name: str) -> None:
    params = parameters()
    optimizer = build_optimizer(name, params, lr=1e-2, weight_decay=0.1)
    set_gradients(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    _, finite = clip_and_check(params, 1.0)
    gated_step(optimizer, finite)
    assert torch.equal(params[2], before)
    assert not torch.equal(params[4], parameters()[4])


def test_clipping_scales_to_the_global_norm() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm, finite = clip_and_check(params, 10.0)
    assert norm == 5
    assert finite
    assert torch.equal(params[1].grad, torch.tensor([4.0]))
    clip_and_check(params, 0.5)
    torch.testing.assert_close(torch.cat([params[0].grad, params[1].grad]), torch.tensor([0.3, 0.0, 0.4]))
    assert clip_and_check(params, float("inf"))[1]
    torch.testing.assert_close(params[1].grad, torch.tensor([0.4]))


def test_wrong_arguments_are_user_errors() -> None:
    wrong: list[dict[str, Any]] = [
        {"name": "adam"},
        {"name": "came", "betas": (0.9, 0.99)},
        {"name": "adamw", "eps": (1e-30, 1e-16)},
    ]
    for arguments in wrong:
        with pytest.raises(UserError):
            build_optimizer(params=parameters(), lr=1e-3, **arguments)


def test_an_optimizer_that_ignores_the_flag_is_refused() -> None:
    params = parameters()
    with pytest.raises(TypeError, match="found_inf"):
        gated_step(torch.optim.SGD(params, lr=1e-3), NOT_FINITE)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


def whole_update(name: str, device: str) -> Callable[[], None]:
    """What follows the backward pass in a training step."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(3, 3, 3)).to(device)
    optimizer = build_optimizer(name, model.parameters(), lr=1e-3, weight_decay=0.01)
    averages = [EMA(model, "power"), EMA(model, "halflife")]
    guard = NonFiniteGuard(10, device)
    model(torch.ones(1, 2, 8, 8, device=device)).sum().backward()

    def update() -> None:
        _, finite = clip_and_check(model.parameters(), 1.0)
        gated_step(optimizer, finite)
        for ema in averages:
            ema.update(model, finite)
        guard.update(finite)

    return update


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_an_update_reads_nothing_on_the_host(name: str) -> None:
    update = whole_update(name, "cpu")
    with NoHostReads():
        update()
        with pytest.raises(AssertionError, match="read on the host"):  # the mode does see a read
            torch.ones(()).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "came"])
def test_an_update_does_not_sync_a_gpu(name: str) -> None:
    update = whole_update(name, "cuda")
    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
