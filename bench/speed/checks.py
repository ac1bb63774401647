"""The checks of `bench/checks.py`: each yields rows with an error, what is allowed, and whether it passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any, cast
from unittest.mock import patch

import torch
from tbcm_kernels import dispatch
from tbcm_kernels.ahead import tensors
from tbcm_kernels.catalog import Operator, Size, size_of
from tbcm_kernels.registry import OPERATORS
from torch import Tensor, nn

from speed import arms
from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.models.fp8 import fp8_available, relative_error, to_fp8
from tbcm.runtime.ema import EMA
from tbcm.runtime.optimizer import build_optimizer
from tbcm.runtime.update import PlainUpdate, fused_class
from tbcm.samples.rollouts import Batch, SampleSource
from tbcm.training.methods import sprint
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

Row = dict[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    device: torch.device
    model: str
    dtypes: list[str]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def needs_gpu(self, what: str) -> None:
        """Raises UserError without one."""
        if not self.on_gpu:
            raise UserError(f"{what} needs a GPU")


def row(case: str, error: float, allowed: float) -> Row:
    """An error that is not a number does not pass."""
    return {"case": case, "error": error, "allowed": allowed, "passed": error <= allowed}


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| over |exact|."""
    found, exact = (x.detach().to(torch.float64) for x in (found, exact))
    return float((found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))


# Operators


def operators(setting: Setting) -> Iterator[Row]:
    """A kernel may be three times as far from fp64 as PyTorch's own operators in the same dtype, or a few roundings."""
    for name, operator in OPERATORS.items():
        for (model, size), short in product(_sizes(setting, operator).items(), setting.dtypes):
            for tangents in (False, True)[: 1 + operator.has_tangents]:
                yield from _operator(setting, operator, size, DTYPES[short], tangents, f"{name}{model} {short}")


def _sizes(setting: Setting, operator: Operator) -> dict[str, Size]:
    """On a GPU of the model that is asked for. Where that is without the operator, of those with it: of one sample, as
    scores of 4,096 tokens in fp64 take 3 GB."""
    if setting.on_gpu and setting.model in operator.models:
        return {"": size_of(setting.model, points=3)}
    if setting.on_gpu:
        return {f" in {model}": size_of(model, points=1) for model in operator.models}
    return {
        "": Size(prompts=1, points=2, rows=8, columns=8, dim=64, heads=2, cross_heads=2, hidden=32, text=8, channels=4)
    }


def _operator(
    setting: Setting, operator: Operator, size: Size, dtype: torch.dtype, tangents: bool, name: str
) -> Iterator[Row]:
    torch.manual_seed(0)
    arguments = operator.inputs(size, dtype, setting.device, tangents)
    with nullcontext() if setting.on_gpu else dispatch.using("interpret"):
        values, gradients = _values(operator.run, arguments)
    plain, plain_gradients = _values(operator.reference, arguments)
    exact, exact_gradients = _values(operator.reference, _in_fp64(arguments))
    for kind, ours, theirs, right in (
        ("value" + " and tangent" * tangents, values, plain, exact),
        ("gradients", gradients, plain_gradients, exact_gradients),
    ):
        if right:
            pairs = list(zip(ours, theirs, right, strict=True))
            error, of_plain = (max(distance(each[i], each[2]) for each in pairs) for i in (0, 1))
            yield row(f"{name} {kind}", error, max(3 * of_plain, 2 * torch.finfo(dtype).eps))


def _values(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of their product with fixed noise."""
    found = list(tensors(function(*arguments)))
    outputs, leaves = ([x for x in tensors(each) if x.requires_grad] for each in (tuple(found), arguments))
    if not outputs or not leaves:
        return found, []
    noise = torch.Generator(outputs[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=noise, device=y.device).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return found, [gradient for gradient in gradients if gradient is not None]


def _in_fp64(value: Any) -> Any:
    if isinstance(value, Tensor):
        wide = value.detach().to(torch.float64) if value.is_floating_point() else value
        return wide.requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(map(_in_fp64, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


# Steps


def graph(setting: Setting) -> Iterator[Row]:
    setting.needs_gpu("a CUDA graph")
    sources = [_trainer(setting, {"teacher.cuda_graph": on}).source for on in (False, True)]
    for step in range(2):  # the first captures, the second replays
        eager, replayed = (next(iter(source(step))).trajectory for source in sources)
        yield row(f"x of step {step}", distance(replayed.x, eager.x), 1e-3)
        yield row(f"dx/dt of step {step}", distance(replayed.dxdt, eager.dxdt), 1e-3)


def overlap(setting: Setting) -> Iterator[Row]:
    """On a CPU, which has no streams, the order alone."""
    trainers = [_trainer(setting, {"train.overlap_rollout": on}) for on in (False, True)]
    for trainer in trainers:
        for _ in range(3):
            trainer.train_step()
    weights = [_flat(trainer.student.parameters()) for trainer in trainers]
    start = _flat(_trainer(setting, {}).student.parameters())
    yield row("the student's change in 3 steps", distance(weights[1] - start, weights[0] - start), 2e-2)


def update(setting: Setting) -> Iterator[Row]:
    for name in ("adamw", "came"):
        plain, fused = (_updated(setting.device, name, fused) for fused in (False, True))
        start = _flat(_layers(setting.device).parameters())
        for kind, ours, theirs in zip(("weights", "average"), fused, plain, strict=True):
            yield row(f"{name}, the {kind}' change in 5 steps", distance(ours - start, theirs - start), 1e-4)


def _layers(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(1152, 576), nn.Conv2d(576, 96, 1), nn.Conv2d(96, 96, 3, groups=96), nn.Linear(7, 3))
    return made.to(device)


def _updated(device: torch.device, name: str, fused: bool) -> tuple[Tensor, Tensor]:
    """Weights and average after five steps."""
    model = _layers(device)
    optimizer = build_optimizer(name, model.parameters(), lr=1e-3, weight_decay=0.01)
    ema = EMA(model, "power", sigma_rel=0.1)
    made = (fused_class(optimizer) if fused else PlainUpdate)(model, optimizer, ema, 1.0)
    noise = torch.Generator(device).manual_seed(2)
    for _ in range(5):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=noise, device=device)
        _, finite = made.clip()
        made.step(finite)
    return _flat(model.parameters()), _flat(ema.shadow[key] for key, _ in model.named_parameters())


@torch.no_grad()
def fp8(setting: Setting) -> Iterator[Row]:
    if not fp8_available(setting.device):
        raise UserError("fp8 needs a GPU of compute capability 8.9 or later")
    trainer = _trainer(setting, {})
    batch = next(iter(trainer.source(0)))
    t = torch.full((1,), 1.5, device=setting.device)
    u, w = batch.trajectory.x[:1, 0], torch.full((1,), 4.5, device=setting.device)
    exact = trainer.teacher(u, t, batch.condition, w).F
    rounded: Any = deepcopy(trainer.teacher)
    layers = to_fp8(rounded)
    yield row(f"{len(layers)} layers", relative_error(exact, rounded(u, t, batch.condition, w).F), 0.1)


def sync(setting: Setting) -> Iterator[Row]:
    setting.needs_gpu("a step that may wait for nothing")
    trainer = _trainer(setting, {})
    for _ in range(3):
        trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield row("waits for the device in a step", 0.0, 0.0)


def methods(setting: Setting) -> Iterator[Row]:
    """Weights, batches and all other draws are the CPU's, of the tiny model."""
    small = replace(setting, model="tiny")
    exact = {"teacher.precision": "fp32", "student.precision": "fp32", "teacher.compile": False}
    for method in ("tbcm", "scm", "sprint"):
        here = _trainer(replace(small, device=CPU), exact, method)
        there = _trainer(small, exact, method)
        there.student.load_state_dict(here.student.state_dict())
        there.teacher.load_state_dict(here.teacher.state_dict())
        for name, each in there.method.beside.items():
            each.net.load_state_dict(here.method.beside[name].net.state_dict())
        batches = list(here.source(0))
        for trainer in (here, there):
            trainer.source = cast(SampleSource, _Given(here.source, [moved(b, trainer.device) for b in batches]))
            trainer.method.source = trainer.source
        losses = []
        for trainer in (here, there):
            with _draws_of_a_cpu(trainer.device):
                loss = trainer.gradients()
            assert loss is not None
            losses.append(loss.cpu())
        yield row(f"{method}, loss", distance(losses[1], losses[0]), 1e-3)
        ours, right = (_flat(p.grad for p in t.parameters if p.grad is not None).cpu() for t in (there, here))
        yield row(f"{method}, gradients", distance(ours, right), 1e-2)


class _Given:
    """The batches of a step, as another source makes them."""

    def __init__(self, like: SampleSource, batches: list[Batch]) -> None:
        self.batches, self.first_point, self.samples_per_prompt = (
            like.batches,
            like.first_point,
            like.samples_per_prompt,
        )
        self._batches = batches

    def __call__(self, step: int) -> Iterator[Batch]:
        return iter(self._batches)


def moved(value: Any, device: torch.device) -> Any:
    """The same on another device, in dataclasses and mappings."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value) if field.init}
        return replace(value, **parts)
    return value


def _draws_of_a_cpu(device: torch.device) -> AbstractContextManager[object]:
    drawn: Callable[..., Any] = sprint.draw_adversarial
    return patch.object(sprint, "draw_adversarial", lambda *given: moved(drawn(*given[:-1], CPU), device))


def _trainer(setting: Setting, change: dict[str, Any], method: str = "tbcm") -> Trainer:
    config = _changed(arms.config(setting.model, "kernels", method, 3, 4, setting.device), change)
    torch.manual_seed(0)
    return Trainer(config, setting.device, random_parts(config, setting.device))


def _changed(config: Config, change: dict[str, Any]) -> Config:
    for key, value in change.items():
        section, _, name = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def _flat(weights: Any) -> Tensor:
    return torch.cat([weight.detach().flatten().double() for weight in weights])


CHECKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "operators": operators,
    "methods": methods,
    "graph": graph,
    "overlap": overlap,
    "update": update,
    "sync": sync,
    "fp8": fp8,
}
