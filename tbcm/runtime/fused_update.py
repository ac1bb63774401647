"""AdamW, EMA and low-precision copies in one pass over the weights: csrc/fused_update.cu, where it is built.

Works on the same `torch.optim.AdamW` and `EMA` as the plain way (`update.PlainUpdate`), so that a checkpoint of one
goes on with the other. Both agree to rounding: a step's change of a weight to 2e-5 of itself (bias corrections have
more digits here) and a few roundings of the weight to fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError
from tbcm.runtime.distributed import local
from tbcm.runtime.ema import EMA
from tbcm.runtime.optimizer import gradient_norm, parameters

LIBRARY = Path(__file__).parent / "_native" / "libtbcm_fused_update.so"
_BUILD = "run `python csrc/build.py` in a checkout of tbcm that is installed with pip install -e"

# As in csrc/fused_update.h
_VERSION = 1
_STORAGE = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class FusedUpdate:
    """The interface of `update.PlainUpdate`, for AdamW and fp32 weights on one CUDA device.

    A sharded weight (DTensor) is updated shard by shard, each rank its own: all but the norm is elementwise, and the
    norm is that of the whole. The optimiser's `step` and its hooks are not called.

    Args:
        max_norm: gradients are clipped to this global L2 norm (inf: not at all).
        copies: by name of a weight of `model`, a tensor that gets its value; all bf16 or all fp16.
        library: the C interface of csrc/fused_update.h; default: what csrc/build.py made.

    Raises:
        UserError: it cannot be; says why and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        max_norm: float,
        copies: Mapping[str, Tensor] | None = None,
        library: ctypes.CDLL | None = None,
    ) -> None:
        names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self.params = parameters(optimizer)
        self.names = [names[param] for param in self.params]
        self.optimizer, self.ema, self.max_norm, self.copies = optimizer, ema, max_norm, dict(copies or {})
        self._check()
        self.device = self.params[0].device
        self.library = library or _library_for(self.device)
        self._factor: Tensor | None = None
        self._table: _Table | None = None
        self._current_table()  # what it cannot do is said now, not in the first step

    def _check(self) -> None:
        if not isinstance(self.optimizer, torch.optim.AdamW):
            raise UserError(f"the fused step is AdamW's, not {type(self.optimizer).__name__}'s: optimizer.name=adamw")
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor) or group["amsgrad"] or group["maximize"]:
                raise UserError("the fused step knows no amsgrad, maximize or learning rate in a tensor: leave it out")
        if set(self.names) != self.ema.shadow.keys():
            raise UserError("the fused step needs optimiser and EMA to have the same weights: give both all of them")
        if len({param.device for param in self.params}) != 1:
            raise UserError("the fused step needs all weights on one device: move them there")
        for name, param in zip(self.names, self.params, strict=True):
            if param.dtype != torch.float32:
                raise UserError(f"the fused step needs float32 weights: {name} is {param.dtype}, use autocast instead")
        dtypes = {copy.dtype for copy in self.copies.values()}
        if len(dtypes) > 1 or torch.float32 in dtypes or not dtypes <= _STORAGE.keys():
            raise UserError(f"the fused step writes copies all in bfloat16 or all in float16: not in {dtypes}")

    @torch.no_grad()
    def clip(self) -> tuple[Tensor, Tensor]:
        """As `PlainUpdate.clip`, but the gradients stay as they are: `step` scales them as it reads them."""
        norm = gradient_norm(self.params).to(self.device)
        self._factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        return norm, norm.isfinite()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """As `PlainUpdate.step`. Reads nothing on the host."""
        if self._factor is None:
            raise RuntimeError("FusedUpdate.step without clip: how far to clip is not known")
        weight = self.ema.advance(finite)
        gradients = [_gradient(param) for param in self.params]  # a copy among them must live until the launch
        dtypes = {gradient.dtype for gradient in gradients if gradient is not None} or {torch.float32}
        if len(dtypes) > 1 or not dtypes <= _STORAGE.keys():
            raise TypeError(f"the fused step takes gradients of one dtype, not {dtypes}")
        copy_type = next((copy.dtype for copy in self.copies.values()), torch.bfloat16)
        table = self._current_table()
        rows, steps, gate = table.rows.data_ptr(), table.steps.data_ptr(), finite.data_ptr()
        with self._on_device():
            stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else None
            first = 0
            for group in self.optimizer.param_groups:
                count = len(group["params"])
                addresses = (ctypes.c_void_p * count)(*map(_gradient_address, gradients[first : first + count]))
                hyper = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
                self._call("begin", rows, steps, addresses, first, count, *hyper, gate, stream)
                first += count
            chunks = table.chunks.data_ptr(), len(table.chunks)
            types = _STORAGE[dtypes.pop()], _STORAGE[copy_type]
            scalars = self._factor.data_ptr(), weight.data_ptr()
            self._call("update", rows, steps, *chunks, *types, *scalars, gate, stream)
        self._factor = None
        torch.autograd.graph.increment_version(self.params)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.library, f"tbcm_fused_{name}")(*arguments):
            raise RuntimeError(f"fused optimizer step, {name}: {_explain(self.library, code)}")

    def _current_table(self) -> _Table:
        """Where everything is; made anew where something has moved (a checkpoint was loaded, say)."""
        parts = [self._parts(name, param) for name, param in zip(self.names, self.params, strict=True)]
        addresses = [[part.data_ptr() for part in row] + [0] * (6 - len(row)) for row in parts]
        if self._table is None or self._table.addresses != addresses:
            for name, row in zip(self.names, parts, strict=True):
                _check_layout(name, *row)
            sizes = [local(param).numel() for param in self.params]
            self._table = _make_table(addresses, sizes, self.library, self.device)
        return self._table

    def _parts(self, name: str, param: Tensor) -> list[Tensor]:
        """This rank's weight, averages, step, shadow and, if any, copy, in the order of the table."""
        state = self.optimizer.state[param]
        parts = [param, state["exp_avg"], state["exp_avg_sq"], state["step"], self.ema.shadow[name]]
        return [local(part) for part in (*parts, *([self.copies[name]] if name in self.copies else []))]


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """A library with the interface of csrc/fused_update.h. Needs no GPU.

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
    library.tbcm_fused_begin.argtypes = [*[pointer] * 3, *[integer] * 2, *[double] * 5, *[pointer] * 2]
    library.tbcm_fused_update.argtypes = [*[pointer] * 3, *[integer] * 3, *[pointer] * 4]
    library.tbcm_fused_error.restype = ctypes.c_char_p
    return library


def _library_for(device: torch.device) -> ctypes.CDLL:
    if device.type != "cuda":
        raise UserError(f"the fused step needs a CUDA device: the weights are on {device.type}")
    library = load_library(LIBRARY)
    with torch.cuda.device(device):
        if code := library.tbcm_fused_check():
            major, minor = torch.cuda.get_device_capability()
            build = f"run `python csrc/build.py --arch {major}{minor}`"
            raise UserError(f"the fused step is not built for this card ({_explain(library, code)}): {build}")
    return library


def _explain(library: ctypes.CDLL, code: int) -> str:
    return str(library.tbcm_fused_error(code).decode())


@dataclass(frozen=True)
class _Table:
    """On the device, what csrc/fused_update.h calls Tensor, Step (room for it) and Chunk."""

    addresses: list[list[int]]
    rows: Tensor  # [T, 7] int64
    steps: Tensor  # bytes
    chunks: Tensor  # [N, 2] int32


def _make_table(addresses: list[list[int]], sizes: list[int], library: ctypes.CDLL, device: torch.device) -> _Table:
    rows = torch.tensor([[*row, size] for row, size in zip(addresses, sizes, strict=True)])
    steps = torch.empty(len(rows) * library.tbcm_fused_step_bytes(), dtype=torch.uint8, device=device)
    counts = -(-torch.tensor(sizes) // library.tbcm_fused_chunk())
    owner = torch.repeat_interleave(counts)
    index = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return _Table(addresses, rows.to(device), steps, torch.stack([owner, index], 1).to(device, torch.int32))


def _check_layout(
    name: str, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, shadow: Tensor, *copy: Tensor
) -> None:
    """A weight and what belongs to it are walked through in one order of memory, without gaps."""
    dense = torch.empty_like(param, device="meta").stride()
    for part in (param, exp_avg, exp_avg_sq, shadow, *copy):
        if part.shape != param.shape or part.stride() != dense or part.device != param.device:
            raise UserError(f"weight {name} and its state differ in layout or device: set optimizer.fused=false")
    for part in (exp_avg, exp_avg_sq, step, shadow):
        if part.dtype != torch.float32 or part.device != param.device:
            raise UserError(f"weight {name} has state not in float32 on {param.device}: set optimizer.fused=false")


def _gradient(param: Tensor) -> Tensor | None:
    """This rank's gradient, in the weight's order of memory (in which autograd and DDP nearly always give it)."""
    if param.grad is None:
        return None
    if isinstance(param, DTensor) and isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
        raise TypeError(f"a gradient is {param.grad.placements} where its weight is {param.placements}")
    gradient, weight = local(param.grad), local(param)
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _gradient_address(gradient: Tensor | None) -> int | None:
    """None where there is no gradient; an empty one is at 0 and yet there."""
    return None if gradient is None else gradient.data_ptr() or 1
