"""In what precision networks are kept and compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tbcm.config import Config
from tbcm.config.section import Precision, Switch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA from Ampere on, fp16 before (V100), fp32 elsewhere: few CPUs multiply bf16 faster."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def switch(value: Switch, device: torch.device) -> bool:
    """auto: on CUDA."""
    return device.type == "cuda" if value == "auto" else value


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which fp32 weights compute in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """How frozen weights that compute in `dtype` are kept: fp16 has too little range for whole networks in it, so those
    stay in fp32 and autocast; bf16 weights are half the memory and are not cast again on every call."""
    return torch.float32 if dtype == torch.float16 else dtype


def teacher_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the teacher's weights are kept."""
    half = config.teacher.half_weights
    return weights_dtype(dtype_of(config.teacher.precision, device)) if half else torch.float32


def teacher_autocast(config: Config, device: torch.device) -> torch.autocast:
    """Casts weights that are kept in more precision than they compute in."""
    dtype = dtype_of(config.teacher.precision, device)
    return autocast(dtype if teacher_weights(config, device) != dtype else torch.float32, device)


def student_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the weights of a student that is no longer trained are kept."""
    return weights_dtype(dtype_of(config.student.precision, device))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have weights of `dtype`: a conversion afterwards would cost memory that a run never needs."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
