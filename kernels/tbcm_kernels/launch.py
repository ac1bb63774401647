"""Operators made of Triton kernels, and launching these or compiling them ahead of time where there is no GPU.

Called one by one, an operator is a custom operator of PyTorch, whose dispatch takes longer than a small kernel runs.
Under torch.compile it is taken apart: inductor sees its allocations, casts and kernels, and calls these from its own
code.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tbcm_kernels import dispatch

try:
    import triton
    from triton import language as tl

    jit = triton.jit
except ImportError:  # not Linux: `dispatch.fused` is never true, and the kernels are functions that nobody calls
    triton = tl = None

    def jit(function: Any) -> Any:
        return function


__all__ = ["Compiled", "compile_ahead", "exact_product", "jit", "launch", "operator", "tl", "triton", "wide"]

_TRACEABLE = triton is not None and os.environ.get("TRITON_INTERPRET") != "1"  # an interpreted kernel cannot be traced

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.int64: "i64"}


@dataclass(frozen=True)
class Compiled:
    """A kernel made for an architecture: its cubin's size and the shared memory of a block, in bytes; a thread's
    registers, and the bytes of what did not fit into them and is kept in memory."""

    kernel: str
    arch: int
    cubin: int
    shared: int
    registers: int
    spilled: int


_targets: tuple[int, ...] = ()
_compiled: list[Compiled] = []


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes the custom operator `name` of a function of PyTorch's operators and of `launch`.

    The function is its own fake: on tensors without data, and while torch.compile traces it, `launch` runs nothing.
    """

    def made(function: Callable[..., Any]) -> Any:
        if _TRACEABLE:
            return torch.library.triton_op(name, function, mutates_args=mutates_args)
        opaque = torch.library.custom_op(name, function, mutates_args=mutates_args)
        opaque.register_fake(function)
        return opaque

    return made


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` over `grid` on the device of its tensors; an empty grid runs nothing.

    Arguments go by position, tl.constexpr and options (num_warps, num_stages, maxnreg) by name. Code that torch.compile
    makes calls the kernel without `maxnreg`, which inductor cannot pass on, and with floats in fp64, which Triton by
    itself passes in fp32: kernels cast them.
    """
    if 0 in grid:
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    if isinstance(tensor, FakeTensor | FunctionalTensor) or tensor.is_meta:
        if _TRACEABLE and not tensor.is_meta:
            constants.pop("maxnreg", None)
            torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
    elif dispatch.mode() == "ahead":
        _compiled.extend(_compile(kernel, arch, arguments, constants) for arch in _targets)
    else:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            kernel[grid](*arguments, **constants)


@contextmanager
def compile_ahead(*archs: int) -> Iterator[list[Compiled]]:
    """Inside, operators on tensors of any device compile their kernels for compute capabilities `archs` (80, 90, ...),
    into the list that is yielded, and run nothing: what they return is not initialised."""
    global _targets
    _compiled.clear()
    _targets = archs
    with dispatch.using("ahead"):
        yield _compiled


def _compile(kernel: Any, arch: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    signature, aligned = dict.fromkeys(kernel.arg_names, "constexpr"), []
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        # As Triton specialises at run time: on None and 1, and on multiples of 16.
        if value is None or (type(value) is int and value == 1):
            constexprs[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            aligned.append(i)
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(kernel.__name__, arch, len(made.asm["cubin"]), made.metadata.shared, *_resources(made.asm["cubin"]))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a thread, as the tool says that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"{command[0]} says nothing of registers: {said}")
    return int(found[1]), int(found[2])


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


@jit
def exact_product(x, y):
    """x y, rounded: no compiler joins it with a sum that follows, as it may a plain product."""
    return tl.fma(x, y, 0.0)


def wide(dtype: torch.dtype) -> Any:
    """The type that kernels compute in, for tensors of `dtype`: fp32; for fp64, in tests, fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32
