"""Everything runs twice: on a CPU over tests/csrc/host.cpp (the kernel's arithmetic in a loop), and on a GPU if any."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tbcm.errors import UserError
from tbcm.runtime import checkpoint, fused_update
from tbcm.runtime.ema import EMA, power_function_gamma
from tbcm.runtime.fused_update import FusedUpdate, load_library
from tbcm.runtime.optimizer import build_optimizer
from tbcm.runtime.update import PlainUpdate, build_update

ROOT = Path(__file__).parents[2]
CHUNK = 1 << 14  # csrc/fused_update.h
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Side(NamedTuple):
    library: ctypes.CDLL
    device: torch.device


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if (compiler := shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("no C++ compiler (g++, c++)")
    library = tmp_path_factory.mktemp("host") / "host.so"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, str(ROOT / "tests" / "csrc" / "host.cpp"), "-o", str(library)], check=True)
    return load_library(library)


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    library = tmp_path_factory.mktemp("cuda") / "cuda.so"
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, ROOT / "csrc" / "build.py", "--arch", f"{major}{minor}", "--out", library]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if "no CUDA compiler" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return load_library(library)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def side(request: pytest.FixtureRequest) -> Side:
    library = request.getfixturevalue("host_library" if request.param == "cpu" else "cuda_library")
    return Side(library, torch.device(request.param))


class Odd(nn.Module):
    """Weights of every awkward kind."""

    def __init__(self, device: torch.device, many: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random).to(device))

        self.scalar, self.empty, self.matrix = weight(), weight(0, 3), weight(7, 5)
        self.chunks, self.chunks_and_three = weight(2, CHUNK), weight(3 * CHUNK + 3)
        self.channels_last = nn.Parameter(weight(6, 4, 3, 3).detach().to(memory_format=torch.channels_last))
        buffer = weight(200).detach()
        self.unaligned = nn.Parameter(buffer[1:180].view(179))
        self.unused, self.frozen = weight(9), nn.Parameter(torch.ones(4, device=device), requires_grad=False)
        self.many = nn.ParameterList([weight(3) for _ in range(many)])  # 448 addresses go with a launch


def set_gradients(model: nn.Module, step: int) -> None:
    """Of about unit size times 10^(step % 3 - 1), the same for every model; `unused` has none."""
    random = torch.Generator().manual_seed(100 + step)
    for name, param in model.named_parameters():
        if name in ("unused", "frozen"):
            continue
        value = torch.randn(param.shape, generator=random).to(param.device) * 10.0 ** (step % 3 - 1)
        if name == "unaligned":
            value = torch.cat([value.new_zeros(3), value])[3:]
        param.grad = torch.empty_like(param).copy_(value) if name == "channels_last" else value


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


class Run:
    """A model, what trains it and copies of two of its weights."""

    def __init__(self, side: Side, *, fused: bool, many: int = 0, max_norm: float = 1.0, **settings: Any) -> None:
        self.model = Odd(side.device, many)
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = build_optimizer("adamw", trained, **{**SETTINGS, **settings})
        self.ema = EMA(self.model, "power", sigma_rel=0.1)
        self.copies = {name: self.model.get_parameter(name).detach().bfloat16() for name in ("matrix", "chunks")}
        arguments = self.model, self.optimizer, self.ema, max_norm, self.copies
        self.update = FusedUpdate(*arguments, library=side.library) if fused else PlainUpdate(*arguments)

    def step(self, step: int, bad: float | None = None) -> None:
        set_gradients(self.model, step)
        if bad is not None:
            grad_of(self.model.matrix)[1, 1] = bad
        _, finite = self.update.clip()
        self.update.step(finite)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        found = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{name}.{key}"] = value.clone()
        found |= {f"{name}.shadow": value.clone() for name, value in self.ema.shadow.items()}
        found |= {f"{name}.copy": value.clone() for name, value in self.copies.items()}
        return found | {"updates": self.ema.updates.clone()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(("many", "steps"), [(0, 6), (500, 1)])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_it_agrees_with_the_plain_update(side: Side, many: int, steps: int, max_norm: float) -> None:
    plain, fused = (Run(side, fused=f, many=many, max_norm=max_norm) for f in (False, True))
    for step in range(steps):
        plain.step(step)
        fused.step(step)
        after, ours = plain.tensors(), fused.tensors()
        assert after.keys() == ours.keys()
        for name, value in after.items():
            if name.endswith(("step", "updates")):
                assert torch.equal(ours[name], value), name
            elif name.endswith("copy"):
                assert torch.equal(ours[name], ours[name.removesuffix(".copy")].to(value.dtype)), name
            elif name.endswith(("exp_avg", "exp_avg_sq")):
                largest = float(value.abs().max()) if value.numel() else 0.0
                torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6 * largest, msg=name)
            else:  # a step changes a weight by about lr = 1e-2, and either way rounds it twice, to 6e-8 of itself
                room = (step + 1) * (2e-5 * 1e-2 + 2.4e-7 * value.abs())
                assert ((ours[name] - value).abs() <= room).all(), name
    assert ours["unused.step"] == 0
    assert not torch.equal(ours["matrix"], Odd(side.device).matrix)


def test_it_is_adamw_and_the_ema_by_the_book(side: Side) -> None:
    """In fp64, from arXiv 1711.05101 (Algorithm 2) and the EMA's definition."""
    run = Run(side, fused=True, max_norm=0.5, eps=1e-6)
    theta = {name: p.detach().cpu().double().numpy() for name, p in run.model.named_parameters() if p.requires_grad}
    theta = {name: value.copy() for name, value in theta.items()}
    m, v = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    shadow = {name: value.copy() for name, value in theta.items()}
    gamma = power_function_gamma(0.1)
    for t in range(1, 6):
        run.step(t)
        grads = {n: p.grad.cpu().double().numpy() for n, p in run.model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name in theta:
            if name in grads:
                g = grads[name] * min(1, 0.5 / (norm + 1e-6))
                theta[name] = theta[name] * (1 - 1e-2 * 0.1)
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.99 * v[name] + 0.01 * g**2
                m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.99**t)
                theta[name] = theta[name] - 1e-2 * m_hat / (np.sqrt(v_hat) + 1e-6)
            weight = 1 - (1 - 1 / t) ** (gamma + 1)
            shadow[name] = shadow[name] + weight * (theta[name] - shadow[name])
    ours = run.tensors()
    for name in theta:
        for what, value in (("", theta), (".exp_avg", m), (".exp_avg_sq", v), (".shadow", shadow)):
            tolerance = 1e-6 if what in ("", ".shadow") else 1e-8  # theta is about 1, each change about 1e-2
            np.testing.assert_allclose(ours[name + what].cpu(), value[name], rtol=2e-6, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_is_as_if_it_had_not_been(side: Side, bad_step: int, bad: float) -> None:
    with_bad, without = Run(side, fused=True), Run(side, fused=True)
    for step in range(5):
        if step == bad_step:
            before = with_bad.tensors()
            with_bad.step(50, bad)
            assert_same_bits(with_bad.tensors(), before)
        with_bad.step(step)
        without.step(step)
    assert_same_bits(with_bad.tensors(), without.tensors())


def test_two_runs_give_the_same_bits(side: Side) -> None:
    first, second = Run(side, fused=True), Run(side, fused=True)
    for step in range(3):
        first.step(step)
        second.step(step)
    assert_same_bits(first.tensors(), second.tensors())


def test_groups_have_their_own_numbers(side: Side) -> None:
    def outcome(fused: bool) -> list[Tensor]:
        model = nn.ParameterDict({n: nn.Parameter(torch.ones(5, device=side.device)) for n in "abc"})
        groups = [{"params": [model["a"]], "lr": 1e-1}, {"params": [model["b"], model["c"]], "weight_decay": 0.5}]
        optimizer, ema = build_optimizer("adamw", groups, lr=1e-2), EMA(model)
        update: PlainUpdate | FusedUpdate = PlainUpdate(model, optimizer, ema, 1.0)
        if fused:
            update = FusedUpdate(model, optimizer, ema, 1.0, library=side.library)
        for step in range(3):
            set_gradients(model, step)
            update.step(update.clip()[1])
        return [param.detach() for param in model.values()]

    torch.testing.assert_close(outcome(True), outcome(False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_and_copies(side: Side, dtype: torch.dtype, copies: torch.dtype) -> None:
    def trained(fused_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = nn.Linear(33, 7, bias=False, device=side.device)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 231).view(7, 33))
        mirror = {"weight": model.weight.detach().to(copies)}
        optimizer = build_optimizer("adamw", model.parameters(), **SETTINGS)
        update = FusedUpdate(model, optimizer, EMA(model), math.inf, mirror, library=side.library)
        gradient = torch.linspace(-2, 3, 231, device=side.device).view(7, 33).to(dtype).to(fused_dtype)
        model.weight.grad_dtype = None  # any
        for _ in range(3):
            model.weight.grad = gradient.clone()
            update.step(update.clip()[1])
        return model.weight.detach(), mirror["weight"]

    weight, mirror = trained(dtype)
    assert torch.equal(weight, trained(torch.float32)[0])
    assert torch.equal(mirror, weight.to(copies))


def test_extreme_gradients_give_no_nan(side: Side) -> None:
    run = Run(side, fused=True, max_norm=math.inf)
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


def test_a_gradient_in_another_order_of_memory(side: Side) -> None:
    first, second = Run(side, fused=True), Run(side, fused=True)
    for run in (first, second):
        set_gradients(run.model, 0)
    weight = second.model.channels_last
    weight.grad = grad_of(weight).contiguous()
    assert grad_of(weight).stride() != weight.stride()
    for run in (first, second):
        run.update.step(run.update.clip()[1])
    assert_same_bits(first.tensors(), second.tensors())


@pytest.mark.parametrize("order", [(False, True), (True, False), (True, True)])
def test_a_checkpoint_of_one_way_goes_on_with_the_other(side: Side, order: tuple[bool, bool], tmp_path: Path) -> None:
    first, whole = Run(side, fused=order[0]), Run(side, fused=order[1])
    for step in range(3):
        first.step(step)
    state = {"model": first.model, "optimizer": first.optimizer, "ema": first.ema}
    checkpoint.save(tmp_path, 3, state, config={})
    second = Run(side, fused=order[1])
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
    assert second.tensors()["matrix.step"] == 4


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_on_the_host(side: Side) -> None:
    run = Run(side, fused=True)
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


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_weights(host_library: ctypes.CDLL) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def outcome(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model = nn.Linear(5, 3)
        for name, value in (("weight", torch.linspace(-1, 1, 15).view(3, 5)), ("bias", torch.zeros(3))):
            setattr(model, name, nn.Parameter(place(value)))
        ema = EMA(model)
        update = FusedUpdate(
            model, build_optimizer("adamw", model.parameters(), **SETTINGS), ema, 1.0, library=host_library
        )
        for _ in range(2):
            for param in model.parameters():
                param.grad = place(torch.arange(1.0, param.numel() + 1).view(param.shape))
            norm, finite = update.clip()
            assert norm == pytest.approx(math.sqrt(1240 + 14))
            update.step(finite)
        return [fused_update.local(value).detach() for value in (*model.parameters(), *ema.shadow.values())]

    sharded = outcome(lambda value: distribute_tensor(value, mesh, [Shard(0)]))
    assert all(map(torch.equal, sharded, outcome(lambda value: value)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_a_cpu(host_library: ctypes.CDLL, cuda_library: ctypes.CDLL) -> None:
    cpu = Run(Side(host_library, torch.device("cpu")), fused=True, max_norm=math.inf)
    gpu = Run(Side(cuda_library, torch.device("cuda")), fused=True, max_norm=math.inf)
    for step in range(4):
        cpu.step(step)
        gpu.step(step)
    ours, theirs = cpu.tensors(), {name: value.cpu() for name, value in gpu.tensors().items()}
    for name, value in ours.items():
        if name.endswith("shadow"):  # its weight comes from PyTorch's expm1 and log1p, which differ in the last place
            torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(theirs[name], value), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_fused_on_a_gpu(cuda_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_update, "LIBRARY", Path(cuda_library._name))
    model = nn.Linear(2, 2, device="cuda")
    optimizer = build_optimizer("adamw", model.parameters(), lr=1e-3)
    assert isinstance(build_update(model, optimizer, EMA(model), 1.0), FusedUpdate)


def a_model(dtype: torch.dtype = torch.float32, name: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer, EMA]:
    model = nn.Linear(2, 2, dtype=dtype)
    return model, build_optimizer(name, model.parameters(), lr=1e-3), EMA(model)


def test_where_it_cannot_be_auto_is_plain_and_true_is_an_error() -> None:
    choices: tuple[Literal["auto"] | bool, ...] = ("auto", False)
    for fused in choices:
        assert isinstance(build_update(*a_model(), 1.0, fused=fused), PlainUpdate)
    with pytest.raises(UserError, match=r"optimizer\.fused=true: .*CUDA device.*on cpu") as error:
        build_update(*a_model(), 1.0, fused=True)
    assert "\n" not in str(error.value)


def test_what_it_does_not_know_is_an_error(host_library: ctypes.CDLL) -> None:
    def refuse(match: str, parts: tuple[nn.Module, torch.optim.Optimizer, EMA], **copies: Tensor) -> None:
        with pytest.raises(UserError, match=match):
            FusedUpdate(*parts, 1.0, copies, library=host_library)

    refuse("CAME", a_model(name="came"))
    refuse("float32", a_model(torch.bfloat16))
    refuse("copies", a_model(), weight=torch.zeros(2, 2))
    refuse("copies", a_model(), weight=torch.zeros(2, 2).half(), bias=torch.zeros(2).bfloat16())
    model, optimizer, _ = a_model()
    refuse("same weights", (model, optimizer, EMA(nn.Linear(2, 2, bias=False))))
    optimizer.param_groups[0]["amsgrad"] = True
    refuse("amsgrad", (model, optimizer, EMA(model)))


def test_a_state_in_another_layout_is_an_error(host_library: ctypes.CDLL) -> None:
    model, optimizer, ema = a_model()
    ema.shadow["weight"] = ema.shadow["weight"].T
    with pytest.raises(UserError, match=r"weight weight .* layout"):
        FusedUpdate(model, optimizer, ema, 1.0, library=host_library)


def test_a_library_that_is_missing_broken_or_old(tmp_path: Path, host_library: ctypes.CDLL) -> None:
    with pytest.raises(UserError, match=r"not built: run `python csrc/build\.py`"):
        load_library(tmp_path / "none.so")
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(UserError, match="does not load"):
        load_library(tmp_path / "broken.so")
