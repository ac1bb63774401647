"""Which implementation an operator takes: its Triton kernel, or the PyTorch reference beside it.

CUDA tensors take the kernel, all others the reference. `TBCM_KERNELS=off` in the environment forces the reference. What
a kernel does not support (a shape, a dtype) takes the reference too, and says so once.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

Mode = Literal["on", "off", "interpret", "ahead"]
"""on and off as above; interpret: tensors of a CPU run the kernels in Triton's interpreter, which needs
TRITON_INTERPRET=1 before triton is imported; ahead: kernels are compiled and not run (see `launch.compile_ahead`)."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = torch.float32, torch.bfloat16, torch.float16
_EXACT = *DTYPES, torch.float64  # fp64 is for tests: in the interpreter alone, whose arithmetic is NumPy's


def _from_environment() -> Mode:
    match os.environ.get("TBCM_KERNELS", "on"):
        case "on":
            return "on"
        case "off":
            return "off"
        case other:
            raise ImportError(f"the environment has TBCM_KERNELS={other}: it may be on or off")


_mode: Mode = _from_environment()


_without: frozenset[str] = frozenset()


@contextmanager
def without(*operators: str) -> Iterator[None]:
    """Inside, these operators take their references: what a kernel gives is measured by leaving it out."""
    global _without
    before, _without = _without, _without | set(operators)
    try:
        yield
    finally:
        _without = before


@contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Inside, operators take what `mode` says. Raises ValueError where triton was not imported to be interpreted, or
    its interpreter cannot work."""
    global _mode
    if mode == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("to interpret kernels, set TRITON_INTERPRET=1 before triton is imported")
    if mode == "interpret" and (trouble := interpreter_trouble()):
        raise ValueError(trouble)
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def interpreter_trouble() -> str | None:
    """Why Triton's interpreter cannot work with what is installed."""
    import triton

    of_triton, of_numpy = ([int(n) for n in re.findall(r"\d+", of.__version__)[:2]] for of in (triton, np))
    if of_triton == [3, 6] and of_numpy >= [2, 4]:
        return "the interpreter of triton 3.6 cannot take numpy 2.4: install numpy<2.4 (see constraints-cuda.txt)"
    return None


def mode() -> Mode:
    """What holds now."""
    return _mode


def fused(operator: str, *tensors: Tensor | None, unsupported: str | None = None, in_jvp: bool = False) -> bool:
    """Whether `operator` runs its kernel on these tensors (None: one that is not given).

    `unsupported`: what the kernel cannot do of that which is asked. Under forward-mode differentiation by PyTorch
    (torch.func.jvp) the answer is no: a custom operator's tangent would be zero there, silently. But for one that is
    made to be called `in_jvp`, with values and tangents taken apart.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if _mode == "off" or not HAS_TRITON or operator in _without or (forward_ad._current_level >= 0 and not in_jvp):
        return False
    if _mode == "on" and not all(tensor.is_cuda for tensor in given):
        return False
    known = _EXACT if _mode == "interpret" else DTYPES
    if unknown := [tensor.dtype for tensor in given if tensor.is_floating_point() and tensor.dtype not in known]:
        unsupported = f"{unknown[0]}"
    if unsupported:
        _say(operator, unsupported)
    return not unsupported


@torch.compiler.assume_constant_result
def _say(operator: str, unsupported: str) -> bool:
    """While torch.compile traces, too."""
    return _say_once(operator, unsupported)


@cache
def _say_once(operator: str, unsupported: str) -> bool:
    logging.getLogger(__name__).warning("%s: no kernel for %s; PyTorch's operators instead", operator, unsupported)
    return True
