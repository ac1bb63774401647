"""Runs the code that inductor made for a GPU on a CPU: its kernels in Triton's interpreter, its products by PyTorch.

Every buffer that the code allocates lies between margins, which no kernel may write to.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime import triton_helpers

MARGIN = 256
BLOCKS = {"XBLOCK": 512, "YBLOCK": 16, "R0_BLOCK": 64}
"""Of inductor's own kernels, whose sizes it would choose by trying them: large, as the interpreter counts programs."""


Memory = list[tuple[Tensor, int]]
"""Buffers with their margins, and how many bytes lie between these."""


def module(text: str) -> Callable[[Sequence[Tensor]], tuple[Tensor | None, ...]]:
    """What the module's `call` computes of the tensors in its list. Needs TRITON_INTERPRET=1."""
    text = text.replace("empty_strided_cuda(", "_allocate(").replace("_cuda_getCurrentRawStream", "_is_tracing")
    text = re.sub(r"torch\.cuda\.(_DeviceGuard|set_device)\(0\)", r"\1(0)", text).replace("get_raw_stream(0)", "0")
    text = text.replace("from torch._inductor.async_compile import AsyncCompile", "")
    compiler = SimpleNamespace(triton=_kernel, wait=lambda scope: None)
    memory: Memory = []
    scope: dict[str, Any] = {
        "_DeviceGuard": nullcontext,
        "set_device": lambda device: None,
        "AsyncCompile": lambda: compiler,
        "_allocate": partial(_allocate, memory),
    }
    exec(compile(text, "<inductor's code>", "exec"), scope)

    def run(arguments: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        results = scope["call"](list(arguments))
        for raw, size in memory:
            assert (raw[:MARGIN] == 7).all() and (raw[MARGIN + size :] == 7).all(), "written beyond a buffer"
        return results

    return run


def _allocate(
    memory: list[tuple[Tensor, int]], shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = count * dtype.itemsize
    raw = torch.full((size + 2 * MARGIN,), 7, dtype=torch.uint8)
    memory.append((raw, size))
    return raw[MARGIN : MARGIN + size].view(dtype).as_strided(shape, stride)


class _Decorators:
    """In the place of triton_heuristics: decorators that keep what they are told."""

    def __getattr__(self, name: str) -> Any:
        return lambda **told: lambda function: SimpleNamespace(function=function, **told)


def _kernel(name: str, source: str, device_str: str) -> Any:
    """A kernel as `async_compile.triton` returns it."""
    source = source.replace("triton_helpers.set_driver_to_gpu()", "").replace("libdevice.rsqrt", "tl.rsqrt")
    source = source.replace("from torch._inductor.runtime import triton_helpers, triton_heuristics", "")
    file = f"kernel {len(linecache.cache)}"  # Triton reads the source again, by this name
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    made = ModuleType(name)
    vars(made).update(triton_helpers=triton_helpers, triton_heuristics=_Decorators(), __file__=file)
    exec(compile(source, file, "exec"), vars(made))
    return SimpleNamespace(run=_Run(getattr(made, name)))


class _Run:
    def __init__(self, kernel: Any) -> None:
        self.function, self.told = kernel.function, kernel
        self.constants = dict(kernel.triton_meta["constants"])
        if "FAST" in self.constants:
            self.constants["FAST"] = False  # it is in assembly, which nobody interprets
        if "DOT" in self.constants:
            self.constants["DOT"] = self.constants["WIDE"]  # half-precision products are wrong in the interpreter

    def __call__(self, *arguments: Any, stream: int) -> None:
        names = [name for name, kind in self.told.triton_meta["signature"].items() if name not in BLOCKS]
        if "configs" in vars(self.told):  # one of ours: constants among the arguments stand for themselves
            *arguments, x, y, z = arguments  # type: ignore[assignment]
            names = [name for name in names if name in _positional(self.told)]
            given = dict(zip(names, arguments, strict=True)) | self.constants
            self.function[x, y, z](**given)
            return
        given = dict(zip(names, arguments, strict=True)) | self.constants
        blocks = {name: size for name, size in BLOCKS.items() if name in self.function.arg_names}
        grid = [-(-given[f"{axis}numel"] // blocks[f"{axis.upper()}BLOCK"]) for axis in "xy" if f"{axis}numel" in given]
        self.function[(*grid, 1, 1)[:3]](**given, **blocks)


def _positional(told: Any) -> list[str]:
    """The arguments of a kernel of ours that a launch passes: all but those declared constant."""
    declared = told.inductor_meta["declared_constexpr_names"]
    return [name for name in told.triton_meta["signature"] if name not in declared]
