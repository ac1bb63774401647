"""Training steps on fake CUDA tensors, in a process of its own: python tests/fake_cuda_steps.py FOLDER

Writes FOLDER/steps.json: of every case its error (null: none), the devices that hold its state, and its host reads.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretended_cuda import compile_device, pretend

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    pretend(compile_device())  # before torch is imported

import torch
from host_reads import HostReads
from shrunk import shrink
from speed import arms
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from tbcm.config import Config
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

CUDA = torch.device("cuda")
shrink()


def config(arm: str, method: str = "tbcm", optimizer: str = "came") -> Config:
    """An arm of the benchmarks, of the smallest model, without what compiles for the device or captures its work."""
    made = arms.config("tiny", arm, method, 4, 3, CUDA)
    changes: dict[str, dict[str, Any]] = {
        "teacher": {"compile": False, "cuda_graph": False},
        "student": {"compile": False},
        "optimizer": {"name": optimizer},
        "train": {"points_per_micro_batch": 1 if made.train.points_per_micro_batch else None},
    }
    return made.model_copy(
        update={name: getattr(made, name).model_copy(update=change) for name, change in changes.items()}
    )


def step(config: Config) -> Iterator[Any]:
    """Yields before the step, which is to be watched, and then the devices that its trainer's state is on."""
    trainer = Trainer(config, CUDA, random_parts(config, CUDA))
    yield
    trainer.train_step()
    yield sorted({str(tensor.device) for tensor in _tensors(vars(trainer), set())})


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All that a value holds, in modules, optimizers, objects and containers of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        for part in (*value.parameters(), *value.buffers()):
            yield from _tensors(part, seen)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
    elif type(value).__module__.startswith(("tbcm.", "torch.optim")):
        yield from _tensors(vars(value), seen)


def reading_step() -> Iterator[Any]:
    """Reads the device in every way: what shows that they are seen."""
    x, host = torch.randn(4, device=CUDA), torch.randn(4)
    yield
    x.sum().item()
    x.tolist()
    if x.sum() > 0:
        x.cpu()
    host.to(CUDA)
    host.pin_memory().to(CUDA, non_blocking=True)  # does not wait
    x[x > 0] = 0  # nor does this
    with suppress(DynamicOutputShapeException):
        x[x > 0]
    yield []


CASES: dict[str, Callable[[], Iterator[Any]]] = {
    "reads": reading_step,
    **{arm: lambda arm=arm: step(config(arm)) for arm in ("fast", "lean", "published")},
    **{method: lambda method=method: step(config("fast", method)) for method in ("scm", "sprint")},
    "adamw": lambda: step(config("fast", optimizer="adamw")),
}


def run(case: Iterator[Any]) -> dict[str, Any]:
    error, devices, watch = None, [], HostReads()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            next(case)
            with watch:
                devices = next(case)
    except Exception:
        error = traceback.format_exc()
    return {"error": error, "devices": devices, "reads": watch.reads}


if __name__ == "__main__":
    found = {name: run(case()) for name, case in CASES.items()}
    (FOLDER / "steps.json").write_text(json.dumps(found))
