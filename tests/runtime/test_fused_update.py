"""Both fused steps, on a CPU over tests/csrc (the kernels' arithmetic in loops), and on a GPU if any."""

from __future__ import annotations

import ctypes
import math
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fused import Odd, Run, Side, assert_same_bits, grad_of, set_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tbcm.errors import UserError
from tbcm.runtime import checkpoint, native
from tbcm.runtime.ema import EMA
from tbcm.runtime.fused_update import FusedUpdate
from tbcm.runtime.optimizer import build_optimizer
from tbcm.runtime.update import PlainUpdate, build_update, fused_class

pytestmark = pytest.mark.parametrize("name", ["adamw", "came"])


@pytest.mark.parametrize(("many", "steps"), [(0, 6), (500, 1)])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_it_agrees_with_the_plain_update(side: Side, name: str, many: int, steps: int, max_norm: float) -> None:
    plain, fused = (Run(side, name, fused=f, many=many, max_norm=max_norm) for f in (False, True))
    # How far a step moves a weight, times lr = 1e-2: CAME divides by sqrt(S), which begins at (1 - b3) (u - m)^2.
    change = 1e-2 * {"adamw": 1, "came": 10}[name]
    for step in range(steps):
        plain.step(step)
        fused.step(step)
        after, ours = plain.tensors(), fused.tensors()
        assert after.keys() == ours.keys()
        for what, value in after.items():
            if what.endswith((".step", "updates")):
                assert torch.equal(ours[what], value), what
            elif what.endswith(".copy"):
                assert torch.equal(ours[what], ours[what.removesuffix(".copy")].to(value.dtype)), what
            elif "." not in what.removeprefix("many.") or what.endswith(".shadow"):
                # Either way rounds a weight twice, to 6e-8 of itself.
                room = (step + 1) * (2e-5 * change + 2.4e-7 * value.abs())
                assert ((ours[what] - value).abs() <= room).all(), what
            else:
                largest = float(value.abs().max()) if value.numel() else 0.0
                torch.testing.assert_close(ours[what], value, rtol=1e-5, atol=3e-6 * largest, msg=what)
    assert torch.equal(ours["unused_matrix"], Odd(side.device).unused_matrix)
    assert not any(
        value.any() for what, value in ours.items() if what.startswith("unused_matrix.") and "shadow" not in what
    )
    assert not torch.equal(ours["matrix"], Odd(side.device).matrix)


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_is_as_if_it_had_not_been(side: Side, name: str, bad_step: int, bad: float) -> None:
    with_bad, without = Run(side, name, fused=True), Run(side, name, fused=True)
    for step in range(5):
        if step == bad_step:
            before = with_bad.tensors()
            with_bad.step(50, bad)
            assert_same_bits(with_bad.tensors(), before)
        with_bad.step(step)
        without.step(step)
    assert_same_bits(with_bad.tensors(), without.tensors())


def test_two_runs_give_the_same_bits(side: Side, name: str) -> None:
    first, second = Run(side, name, fused=True), Run(side, name, fused=True)
    for step in range(3):
        first.step(step)
        second.step(step)
    assert_same_bits(first.tensors(), second.tensors())


def test_groups_have_their_own_numbers(side: Side, name: str) -> None:
    def outcome(fused: bool) -> list[Tensor]:
        model = nn.ParameterDict({n: nn.Parameter(torch.ones(5, 2, device=side.device)) for n in "abc"})
        groups = [{"params": [model["a"]], "lr": 1e-1}, {"params": [model["b"], model["c"]], "weight_decay": 0.5}]
        optimizer, ema = build_optimizer(name, groups, lr=1e-2), EMA(model)
        update: PlainUpdate | FusedUpdate = PlainUpdate(model, optimizer, ema, 1.0)
        if fused:
            update = fused_class(optimizer)(model, optimizer, ema, 1.0, library=side.library)
        for step in range(3):
            set_gradients(model, step)
            _, finite = update.clip()
            optimizer.param_groups[1]["lr"] = 1e-2 * (step + 1)  # what counts is that of the step
            update.step(finite)
        return [param.detach() for param in model.values()]

    torch.testing.assert_close(outcome(True), outcome(False), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_and_copies(side: Side, name: str, dtype: torch.dtype, copies: torch.dtype) -> None:
    def trained(fused_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = nn.Linear(33, 7, bias=False, device=side.device)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 231).view(7, 33))
        mirror = {"weight": model.weight.detach().to(copies)}
        optimizer = build_optimizer(name, model.parameters(), lr=1e-2, weight_decay=0.1)
        update = fused_class(optimizer)(model, optimizer, EMA(model), math.inf, mirror, library=side.library)
        gradient = torch.linspace(-2, 3, 231, device=side.device).view(7, 33).to(dtype).to(fused_dtype)
        model.weight.grad_dtype = None  # any
        for _ in range(3):
            model.weight.grad = gradient.clone()
            update.step(update.clip()[1])
        return model.weight.detach(), mirror["weight"]

    weight, mirror = trained(dtype)
    assert torch.equal(weight, trained(torch.float32)[0])
    assert torch.equal(mirror, weight.to(copies))


def test_extreme_gradients_give_no_nan(side: Side, name: str) -> None:
    run = Run(side, name, fused=True, max_norm=math.inf)
    for size in (0.0, 1e-30, 1e-45, -1e16, 0.0):
        set_gradients(run.model, 0)
        for param in run.model.parameters():
            if param.grad is not None:
                param.grad.fill_(size)
        norm, finite = run.update.clip()
        assert finite
        assert (norm > 0) == (abs(size) > 1e-30)  # the squares of smaller ones are 0 in fp32
        run.update.step(finite)
        assert all(value.isfinite().all() for value in run.tensors().values())
    assert run.ema.updates == 5


def test_a_gradient_in_another_order_of_memory(side: Side, name: str) -> None:
    first, second = Run(side, name, fused=True), Run(side, name, fused=True)
    for run in (first, second):
        set_gradients(run.model, 0)
    weight = second.model.channels_last
    weight.grad = grad_of(weight).contiguous()
    assert grad_of(weight).stride() != weight.stride()
    for run in (first, second):
        run.update.step(run.update.clip()[1])
    assert_same_bits(first.tensors(), second.tensors())


@pytest.mark.parametrize("order", [(False, True), (True, False), (True, True)])
def test_a_checkpoint_of_one_way_goes_on_with_the_other(
    side: Side, name: str, order: tuple[bool, bool], tmp_path: Path
) -> None:
    first, whole = Run(side, name, fused=order[0]), Run(side, name, fused=order[1])
    for step in range(3):
        first.step(step)
    state = {"model": first.model, "optimizer": first.optimizer, "ema": first.ema}
    checkpoint.save(tmp_path, 3, state, config={})
    second = Run(side, name, fused=order[1])
    for run in (second, whole):
        run.step(7)  # the table of addresses is made; loading moves the state, in `whole` for certain
    checkpoint.load(tmp_path, {"model": second.model, "optimizer": second.optimizer, "ema": second.ema})
    whole.model.load_state_dict(first.model.state_dict())
    whole.optimizer.load_state_dict(deepcopy(first.optimizer.state_dict()))
    whole.ema.load_state_dict(first.ema.state_dict())
    for run in (second, whole):
        run.step(3)
    assert_same_bits(second.tensors(), whole.tensors())
    assert second.ema.updates == 4
    assert name == "came" or second.tensors()["matrix.step"] == 4


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_on_the_host(side: Side, name: str) -> None:
    run = Run(side, name, fused=True)
    run.step(0)
    set_gradients(run.model, 1)
    with NoHostReads():
        if side.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            run.update.step(run.update.clip()[1])
        finally:
            if side.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_a_cpu(name: str, host_library: ctypes.CDLL, cuda_library: ctypes.CDLL) -> None:
    cpu = Run(Side(host_library, torch.device("cpu")), name, fused=True, max_norm=math.inf)
    gpu = Run(Side(cuda_library, torch.device("cuda")), name, fused=True, max_norm=math.inf)
    for step in range(4):
        cpu.step(step)
        gpu.step(step)
    ours, theirs = cpu.tensors(), {what: value.cpu() for what, value in gpu.tensors().items()}
    for what, value in ours.items():
        if what.endswith("shadow"):  # its weight comes from PyTorch's expm1 and log1p, which differ in the last place
            torch.testing.assert_close(theirs[what], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(theirs[what], value), what


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_fused_on_a_gpu(name: str, cuda_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", Path(cuda_library._name))
    model = nn.Linear(2, 2, device="cuda")
    optimizer = build_optimizer(name, model.parameters(), lr=1e-3)
    assert isinstance(build_update(model, optimizer, EMA(model), 1.0), fused_class(optimizer))


def a_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, EMA]:
    model = nn.Linear(2, 2, dtype=dtype)
    return model, build_optimizer(name, model.parameters(), lr=1e-3), EMA(model)


def test_where_it_cannot_be_auto_is_plain_and_true_is_an_error(name: str) -> None:
    choices: tuple[Literal["auto"] | bool, ...] = ("auto", False)
    for fused in choices:
        assert isinstance(build_update(*a_model(name), 1.0, fused=fused), PlainUpdate)
    with pytest.raises(UserError, match=r"optimizer\.fused=true: .*CUDA device.*on cpu") as error:
        build_update(*a_model(name), 1.0, fused=True)
    assert "\n" not in str(error.value)


def test_what_it_does_not_know_is_an_error(name: str, host_library: ctypes.CDLL) -> None:
    def refuse(match: str, parts: tuple[nn.Module, torch.optim.Optimizer, EMA], **copies: Tensor) -> None:
        with pytest.raises(UserError, match=match):
            fused_class(parts[1])(*parts, 1.0, copies, library=host_library)

    refuse("float32", a_model(name, {"adamw": torch.bfloat16, "came": torch.float64}[name]))
    refuse("copies", a_model(name), weight=torch.zeros(2, 2))
    refuse("copies", a_model(name), weight=torch.zeros(2, 2).half(), bias=torch.zeros(2).bfloat16())
    model, optimizer, _ = a_model(name)
    refuse("same weights", (model, optimizer, EMA(nn.Linear(2, 2, bias=False))))
    refuse("no step of SGD is fused", (model, torch.optim.SGD(model.parameters(), lr=1e-3), EMA(model)))
    if name == "adamw":
        optimizer.param_groups[0]["amsgrad"] = True
        refuse("amsgrad", (model, optimizer, EMA(model)))
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    refuse("learning rate in a tensor", (model, optimizer, EMA(model)))


def test_a_state_in_another_layout_is_an_error(name: str, host_library: ctypes.CDLL) -> None:
    model, optimizer, ema = a_model(name)
    ema.shadow["weight"] = ema.shadow["weight"].T
    with pytest.raises(UserError, match=r"weight weight .* layout"):
        fused_class(optimizer)(model, optimizer, ema, 1.0, library=host_library)


def test_a_step_without_its_norm_is_refused(name: str, host_library: ctypes.CDLL) -> None:
    model, optimizer, ema = a_model(name)
    update = fused_class(optimizer)(model, optimizer, ema, 1.0, library=host_library)
    with pytest.raises(RuntimeError, match="without clip"):
        update.step(torch.tensor(True))
