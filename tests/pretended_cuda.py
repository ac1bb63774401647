"""A GPU that is not there, for steps on fake tensors: `compile_device` before torch is imported, then `pretend`.

Fake tensors know their shape, dtype and device and have no data. With them the real code of a training step runs as on
a GPU, and operators refuse tensors of different devices.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any


def compile_device() -> Path:
    """The pretended device of `pretended_cuda.cpp` as a library, which is compiled once for each torch, in a quarter of
    a minute, and kept where Python keeps what it compiles."""
    spec = importlib.util.find_spec("torch")  # found and not imported
    assert spec is not None
    assert spec.origin is not None
    torch, source = Path(spec.origin).parent, Path(__file__).with_suffix(".cpp")
    made_of = hashlib.sha256(f"{torch} {version('torch')} {source.read_text()}".encode()).hexdigest()[:16]
    library = source.parent / "__pycache__" / f"pretended_cuda-{made_of}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        options = ["-O0", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        links = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run(["g++", *options, str(source), *links, "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


def pretend(library: Path) -> None:
    """For the rest of this process, which has not imported torch yet, there is a GPU of compute capability 9.0."""
    ctypes.CDLL(str(library))
    import torch

    replaced: dict[str, Any] = {
        # not is_available: fake tensors that may not ask a real device's help are made only where there is none
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "default_generators": (torch.Generator("cuda"),),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # autocast asks
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]


class _Stream:
    device = "cuda:0"

    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass
