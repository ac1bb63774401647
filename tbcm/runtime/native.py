"""The library that csrc/build.py makes of csrc/fused_update.cu: found, loaded, and its functions' types told."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from tbcm.errors import UserError

LIBRARY = Path(__file__).parent / "_native" / "libtbcm_fused_update.so"
_BUILD = "run `python csrc/build.py` in a checkout of tbcm that is installed with pip install -e"
_VERSION = 2  # as in csrc/fused_update.h

STORAGE = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""The library's number of a dtype."""


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """A library with the interface of csrc/fused_update.h, adamw.h and came.h. Needs no GPU.

    Raises:
        UserError: it is not there, does not load, or has another version of the interface.
    """
    if not path.exists():
        raise UserError(f"the fused step is not built: {_BUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"the fused step does not load ({error}): {_BUILD}") from None
    if library.tbcm_fused_version() != _VERSION:
        raise UserError(f"the fused step was built from another version of tbcm: {_BUILD}")
    pointer, integer, double = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    library.tbcm_fused_error.restype = ctypes.c_char_p
    library.tbcm_adamw_begin.argtypes = [*[pointer] * 3, *[integer] * 2, *[double] * 5, *[pointer] * 2]
    library.tbcm_adamw_update.argtypes = [*[pointer] * 3, *[integer] * 3, *[pointer] * 4]
    for of_shape in (library.tbcm_came_tiles, library.tbcm_came_scratch):
        of_shape.argtypes, of_shape.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    library.tbcm_came_norm.argtypes = [pointer, pointer, integer, pointer, integer, pointer, integer, *[pointer] * 3]
    library.tbcm_came_hyper.argtypes = [pointer, integer, integer, *[double] * 8, pointer]
    library.tbcm_came_update.argtypes = [pointer, pointer, integer, pointer, *[integer] * 3, *[pointer] * 5]
    return library


def library_for(device: torch.device) -> ctypes.CDLL:
    """What csrc/build.py made, if it has code for this device.

    Raises:
        UserError: it has not, or there is none, or the device is no GPU.
    """
    if device.type != "cuda":
        raise UserError(f"the fused step needs a CUDA device: the weights are on {device.type}")
    library = load_library(LIBRARY)
    with torch.cuda.device(device):
        if code := library.tbcm_fused_check():
            major, minor = torch.cuda.get_device_capability()
            build = f"run `python csrc/build.py --arch {major}{minor}`"
            raise UserError(f"the fused step is not built for this card ({explain(library, code)}): {build}")
    return library


def explain(library: ctypes.CDLL, code: int) -> str:
    """What an answer other than 0 means."""
    return str(library.tbcm_fused_error(code).decode())
