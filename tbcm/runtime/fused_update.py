"""What follows the backward pass: clipping, AdamW and EMA, in plain PyTorch or as one pass over the weights (csrc).

Both ways work on the same `torch.optim.AdamW` and `EMA`, so that a checkpoint of one continues with the other. They agree
to rounding: an update of a weight, its averages and its shadow to 2e-5 of themselves (the fused way clips a gradient in
registers, and its bias correction has more digits).

In a step: norm, finite = update.clip(); then, all ranks agreed on `finite`, update.step(finite).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError
from tbcm.runtime.ema import EMA
from tbcm.runtime.optimizer import clip_and_check, gated_step, gradient_norm

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "_native" / "libtbcm_fused_update.so"
_BUILD = "run `python csrc/build.py` in a checkout of tbcm"
_VERSION = 1  # csrc/fused_update.h: kVersion
_STORAGE = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/fused_update.h: Storage
_HALF = torch.bfloat16, torch.float16


class PlainUpdate:
    """Clipping, optimiser and EMA one after the other: any optimiser, any device.

    Args:
        copies: by name of a weight of `model`, a tensor of its shape that gets its value, rounded to its dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        max_norm: float,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.ema, self.max_norm = model, optimizer, ema, max_norm
        weights = dict(model.named_parameters())
        self.copies = [(copy, weights[name]) for name, copy in (copies or {}).items()]
        self.params = _parameters(optimizer)

    def clip(self) -> tuple[Tensor, Tensor]:
        """Global L2 norm of the gradients before clipping, and whether it is finite: fp32 and bool scalars on the
        device. The gradients are scaled in place to a norm of at most `max_norm`."""
        return clip_and_check(self.params, self.max_norm)

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Optimiser, EMA and copies; where `finite` (bool scalar on the device) is false, nothing changes a bit."""
        gated_step(self.optimizer, finite)
        self.ema.update(self.model, finite)
        for copy, weight in self.copies:
            copy.copy_(weight)


class FusedUpdate:
    """AdamW, EMA and copies in one launch that reads and writes every weight once; `PlainUpdate`'s interface.

    A sharded weight (DTensor) is updated shard by shard, each rank its own: all is elementwise but the norm, which is
    taken over the whole. Skips the optimiser's step hooks.

    Args:
        copies: as for `PlainUpdate`; all bf16 or all fp16.
        library: what `load_library` gave.

    Raises:
        UserError: it cannot be (see `obstacle`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        max_norm: float,
        copies: Mapping[str, Tensor] | None = None,
        *,
        library: ctypes.CDLL,
    ) -> None:
        self.copies = dict(copies or {})
        if why := obstacle(model, optimizer, ema, self.copies):
            raise UserError(f"the fused optimizer step cannot be: {why}")
        self.optimizer, self.ema, self.max_norm, self.library = optimizer, ema, max_norm, library
        self.params = _parameters(optimizer)
        names = {param: name for name, param in model.named_parameters()}
        self.names = [names[param] for param in self.params]
        self.device = self.params[0].device
        self.copy_type = _STORAGE[next((copy.dtype for copy in self.copies.values()), torch.bfloat16)]
        self._factor: Tensor | None = None
        self._table: _Table | None = None

    @torch.no_grad()
    def clip(self) -> tuple[Tensor, Tensor]:
        """As `PlainUpdate.clip`, but the gradients stay: `step` scales them as it reads them."""
        norm = gradient_norm(self.params).to(self.device)
        self._factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        return norm, norm.isfinite()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """As `PlainUpdate.step`. Reads nothing on the host."""
        if self._factor is None:
            raise RuntimeError("FusedUpdate.step without FusedUpdate.clip: the gradients' norm is not known")
        weight = self.ema.advance(finite)
        gradients = [_gradient(param) for param in self.params]  # kept until the launch, which may read copies
        storage = {gradient.dtype for gradient in gradients if gradient is not None} or {torch.float32}
        if len(storage) > 1 or not storage <= _STORAGE.keys():
            raise TypeError(f"the fused optimizer step takes gradients of one dtype, not {storage}")
        table, gate = self._current_table(), finite.data_ptr()
        with self._on_device():
            stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else None
            first = 0
            for group in self.optimizer.param_groups:
                count = len(group["params"])
                addresses = [_gradient_address(g) for g in gradients[first : first + count]]
                self._call(
                    self.library.tbcm_fused_begin,
                    *(table.tensors.data_ptr(), table.steps.data_ptr()),
                    *((ctypes.c_void_p * count)(*addresses), first, count),
                    *(group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
                    *(gate, stream),
                )
                first += count
            self._call(
                self.library.tbcm_fused_update,
                *(table.tensors.data_ptr(), table.steps.data_ptr(), table.chunks.data_ptr(), len(table.chunks)),
                *(_STORAGE[storage.pop()], self.copy_type),
                *(self._factor.data_ptr(), weight.data_ptr(), gate, stream),
            )
        self._factor = None
        torch.autograd.graph.increment_version(self.params)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _call(self, function: Any, *arguments: Any) -> None:
        if code := function(*arguments):
            raise RuntimeError(f"{function.__name__}: {self.library.tbcm_fused_error(code).decode()}")

    def _current_table(self) -> _Table:
        """The table of where everything is; made again where something has moved (a checkpoint was loaded)."""
        parts = [self._parts(param, name) for param, name in zip(self.params, self.names, strict=True)]
        addresses = [[0 if part is None else part.data_ptr() for part in row] for row in parts]
        if self._table is None or self._table.addresses != addresses:
            for name, row in zip(self.names, parts, strict=True):
                _check_layout(name, row)
            sizes = [row[0].numel() for row in parts if row[0] is not None]
            self._table = _make_table(addresses, sizes, self.library, self.device)
        return self._table

    def _parts(self, param: Tensor, name: str) -> list[Tensor | None]:
        """The tensors of a row of the table, in the order of csrc/fused_update.h: Tensor."""
        state = self.optimizer.state[param]
        parts = [param, state["exp_avg"], state["exp_avg_sq"], state["step"], self.ema.shadow[name]]
        return [*map(_local, parts), _local(self.copies[name]) if name in self.copies else None]


Update = PlainUpdate | FusedUpdate


def build_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    max_norm: float,
    fused: Literal["auto"] | bool = "auto",
) -> Update:
    """The update of a training step, fused where that is wanted; "auto": where it can be.

    Raises:
        UserError: `fused` is True and it cannot be.
    """
    if fused is False:
        return PlainUpdate(model, optimizer, ema, max_norm)
    on_cuda = all(param.is_cuda for param in _parameters(optimizer))
    why = obstacle(model, optimizer, ema) if on_cuda else "it needs a CUDA device"
    library = None
    if not why:
        try:
            library = load_library(LIBRARY)
            with torch.cuda.device(_parameters(optimizer)[0].device):
                why = _unfit(library)
        except UserError as error:
            why = str(error)
    if library and not why:
        return FusedUpdate(model, optimizer, ema, max_norm, library=library)
    if fused is True:
        raise UserError(f"optimizer.fused=true cannot be: {why} (or set optimizer.fused=false)")
    if on_cuda and isinstance(optimizer, torch.optim.AdamW):
        logger.info("the optimizer step is plain PyTorch: %s", why)
    return PlainUpdate(model, optimizer, ema, max_norm)


def obstacle(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, copies: Mapping[str, Tensor] | None = None
) -> str:
    """Why the fused update cannot take these, and what to do; "" where it can."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return f"it knows AdamW, not {type(optimizer).__name__}: set optimizer.name=adamw"
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) or group["amsgrad"] or group["maximize"]:
            return "it knows neither amsgrad, maximize nor a learning rate on the device: leave them out"
    names = {param: name for name, param in model.named_parameters()}
    params = _parameters(optimizer)
    if {names.get(param) for param in params} != ema.shadow.keys():
        return "optimizer and EMA have different weights: give both all that is trained"
    if len({param.device for param in params}) != 1:
        return "the weights are on several devices: keep them on one"
    for param in params:
        if param.dtype != torch.float32:
            return f"weight {names[param]} is {param.dtype}: keep weights in float32 (autocast)"
    dtypes = {copy.dtype for copy in (copies or {}).values()}
    if len(dtypes) > 1 or not dtypes <= set(_HALF):
        return f"its copies are all bfloat16 or all float16, not {dtypes}"
    return ""


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """The compiled csrc/fused_update.cu; loads without a GPU too.

    Raises:
        UserError: it is not there, does not load, or is of another version.
    """
    if not path.exists():
        raise UserError(f"its library is not built: {_BUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"its library does not load ({error}): {_BUILD}") from None
    if library.tbcm_fused_version() != _VERSION:
        raise UserError(f"its library is of another version of tbcm: {_BUILD}")
    pointer, integer, double = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    library.tbcm_fused_begin.argtypes = [*[pointer] * 3, *[integer] * 2, *[double] * 5, *[pointer] * 2]
    library.tbcm_fused_update.argtypes = [*[pointer] * 3, *[integer] * 3, *[pointer] * 4]
    library.tbcm_fused_error.restype = ctypes.c_char_p
    return library


def _unfit(library: ctypes.CDLL) -> str:
    """Why the library has no code for the current device, "" where it has."""
    if code := library.tbcm_fused_check():
        major, minor = torch.cuda.get_device_capability()
        said = library.tbcm_fused_error(code).decode()
        return f"its library does not fit this card ({said}): run `python csrc/build.py --arch {major}{minor}`"
    return ""


@dataclass(frozen=True)
class _Table:
    addresses: list[list[int]]
    tensors: Tensor  # [T, 7] int64: csrc/fused_update.h: Tensor
    steps: Tensor  # [T * bytes] uint8: Step
    chunks: Tensor  # [N, 2] int32: Chunk


def _make_table(addresses: list[list[int]], sizes: list[int], library: ctypes.CDLL, device: torch.device) -> _Table:
    rows = [[*row, size] for row, size in zip(addresses, sizes, strict=True)]
    counts = -(-torch.tensor(sizes) // library.tbcm_fused_chunk())
    tensor = torch.repeat_interleave(counts)
    index = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return _Table(
        addresses,
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.empty(len(rows) * library.tbcm_fused_step_bytes(), dtype=torch.uint8, device=device),
        torch.stack([tensor, index], 1).to(torch.int32).to(device),
    )


def _check_layout(name: str, row: list[Tensor | None]) -> None:
    """A weight and what belongs to it are walked through in one order of memory."""
    param, exp_avg, exp_avg_sq, step, shadow, copy = row
    assert param is not None and step is not None
    like = torch.empty_like(param, device="meta").stride()  # differs where the weight has gaps or overlaps
    for part in (param, exp_avg, exp_avg_sq, shadow, copy):
        if part is not None and (part.stride() != like or part.shape != param.shape or part.device != param.device):
            raise UserError(f"weight {name} and its state differ in layout: set optimizer.fused=false")
    for part in (exp_avg, exp_avg_sq, step, shadow):
        if part is not None and (part.dtype != torch.float32 or part.device != param.device):
            raise UserError(f"the state of weight {name} is not float32 on {param.device}: set optimizer.fused=false")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradient(param: Tensor) -> Tensor | None:
    """The gradient in the order of the weight's memory (autograd and DDP nearly always give it so)."""
    if param.grad is None:
        return None
    if isinstance(param, DTensor) and isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
        raise TypeError(f"a gradient is {param.grad.placements} where its weight is {param.placements}")
    gradient, weight = _local(param.grad), _local(param)
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _gradient_address(gradient: Tensor | None) -> int | None:
    """None: no gradient. An empty one has no address and is one all the same."""
    return None if gradient is None else gradient.data_ptr() or 1
