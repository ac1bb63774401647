"""Clipping, optimiser, EMA and low-precision copies in few passes over the weights: csrc, where it is built.

Works on the same optimisers and `EMA` as the plain way (`update.PlainUpdate`), so that a checkpoint of one goes on with
the other.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError
from tbcm.runtime.distributed import local
from tbcm.runtime.ema import EMA
from tbcm.runtime.native import STORAGE, explain, library_for
from tbcm.runtime.optimizer import parameters


class FusedUpdate(ABC):
    """The interface of `update.PlainUpdate`, for fp32 weights on one CUDA device.

    The optimiser's `step` and its hooks are not called.

    Args:
        max_norm: gradients are clipped to this global L2 norm (inf: not at all).
        copies: by name of a weight of `model`, a tensor that gets its value; all bf16 or all fp16.
        library: the C interface of csrc; default: what csrc/build.py made.

    Raises:
        UserError: it cannot be; says why and what to do.
    """

    optimizers: ClassVar[type[torch.optim.Optimizer]]

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
        self.library = library or library_for(self.device)
        copy_dtype = next((copy.dtype for copy in self.copies.values()), torch.bfloat16)
        self.copy_type = STORAGE[copy_dtype]
        self._factor: Tensor | None = None
        self._table: Table | None = None
        self._current_table()  # what it cannot do is said now, not in the first step

    @torch.no_grad()
    def clip(self) -> tuple[Tensor, Tensor]:
        """As `PlainUpdate.clip`, but the gradients stay as they are: `step` scales them as it reads them."""
        norm = self._norm()
        self._factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        return norm, norm.isfinite()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """As `PlainUpdate.step`. Reads nothing on the host."""
        if self._factor is None:
            raise RuntimeError("FusedUpdate.step without clip: how far to clip is not known")
        self._update(self._factor, self.ema.advance(finite), finite)
        self._factor = None
        torch.autograd.graph.increment_version(self.params)

    @abstractmethod
    def _norm(self) -> Tensor:
        """The gradients' global L2 norm: fp32 scalar on the device."""

    @abstractmethod
    def _update(self, factor: Tensor, ema_weight: Tensor, finite: Tensor) -> None:
        """With the gradients times `factor` (fp32 scalar)."""

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuses a parameter group with what the library does not know."""

    @abstractmethod
    def _parts(self, name: str, param: Tensor) -> Parts:
        """Where what belongs to a weight is."""

    @abstractmethod
    def _make_table(self, parts: list[Parts]) -> Table:
        """For weights whose parts are in order."""

    def _check(self) -> None:
        if not isinstance(self.optimizer, self.optimizers):
            raise TypeError(f"{type(self).__name__} is not for {type(self.optimizer).__name__}")
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                raise UserError("the fused step knows no learning rate in a tensor: make it a number")
            self._check_group(group)
        if set(self.names) != self.ema.shadow.keys():
            raise UserError("the fused step needs optimiser and EMA to have the same weights: give both all of them")
        if len({param.device for param in self.params}) != 1:
            raise UserError("the fused step needs all weights on one device: move them there")
        for name, param in zip(self.names, self.params, strict=True):
            if param.dtype != torch.float32:
                raise UserError(f"the fused step needs float32 weights: {name} is {param.dtype}, use autocast instead")
        dtypes = {copy.dtype for copy in self.copies.values()}
        if len(dtypes) > 1 or torch.float32 in dtypes or not dtypes <= STORAGE.keys():
            raise UserError(f"the fused step writes copies all in bfloat16 or all in float16: not in {dtypes}")

    def _gradients(self) -> tuple[list[Tensor | None], int]:
        """This rank's gradients, in the order of memory of their weights, and the number of their dtype. They must live
        until they have been read: a copy may be among them."""
        gradients = [_gradient(param) for param in self.params]
        dtypes = {gradient.dtype for gradient in gradients if gradient is not None} or {torch.float32}
        if len(dtypes) > 1 or not dtypes <= STORAGE.keys():
            raise TypeError(f"the fused step takes gradients of one dtype, not {dtypes}")
        return gradients, STORAGE[dtypes.pop()]

    def _current_table(self) -> Table:
        """Where everything is; made anew where something has moved (a checkpoint was loaded, say)."""
        parts = [self._parts(name, param) for name, param in zip(self.names, self.params, strict=True)]
        addresses = [part.addresses() for part in parts]
        if self._table is None or self._table.addresses != addresses:
            for name, part in zip(self.names, parts, strict=True):
                part.check(name)
            self._table = self._make_table(parts)
        return self._table

    def _copy(self, name: str) -> Tensor | None:
        return local(self.copies[name]) if name in self.copies else None

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int | None:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.library, f"tbcm_{name}")(*arguments):
            raise RuntimeError(f"fused optimizer step, {name}: {explain(self.library, code)}")


@dataclass(frozen=True)
class Parts:
    """A weight and what belongs to it, of this rank.

    Attributes:
        alike: the weight and what has a number for each of its.
        copy: the weight in a narrower type.
        others: the rest of its state, None where a place in the table stays empty.
    """

    alike: list[Tensor | None]
    copy: Tensor | None
    others: list[Tensor | None]

    def addresses(self) -> list[int]:
        return [0 if part is None else part.data_ptr() for part in (*self.alike, self.copy, *self.others)]

    def check(self, name: str) -> None:
        """A weight and what is like it are walked through in one order of memory, without gaps."""
        state = [part for part in self.alike if part is not None]
        weight, rest = state[0], [part for part in self.others if part is not None]
        dense = torch.empty_like(weight, device="meta")
        for part in (*state, *([] if self.copy is None else [self.copy])):
            if part.shape != weight.shape or not same_order(part, dense) or part.device != weight.device:
                raise UserError(f"weight {name} and its state differ in layout or device: set optimizer.fused=false")
        for part in (*state, *rest):
            if part.dtype != torch.float32 or part.device != weight.device:
                raise UserError(f"weight {name} has state not in float32 on {weight.device}: set optimizer.fused=false")
        if not all(part.is_contiguous() for part in rest):
            raise UserError(f"weight {name} has state with gaps in memory: set optimizer.fused=false")


@dataclass(frozen=True)
class Table:
    """On the device, what csrc calls Tensor, Step (room for it) and Chunk."""

    addresses: list[list[int]]
    rows: Tensor  # [T, ...] int64
    steps: Tensor  # bytes
    chunks: Tensor  # [N, 2] int32
    scratch: tuple[Tensor, ...]  # memory that the rows point to


def make_table(
    parts: list[Parts], numbers: list[list[int]], counts: list[int], step_bytes: int, *scratch: Tensor
) -> Table:
    """`numbers`: what a row has after its addresses. `counts`: chunks of each weight."""
    device = next(part for part in parts[0].alike if part is not None).device
    addresses = [part.addresses() for part in parts]
    rows = torch.tensor([[*row, *more] for row, more in zip(addresses, numbers, strict=True)])
    steps = torch.empty(len(rows) * step_bytes, dtype=torch.uint8, device=device)
    each = torch.tensor(counts)
    owner = torch.repeat_interleave(each)
    index = torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]
    return Table(addresses, rows.to(device), steps, torch.stack([owner, index], 1).to(device, torch.int32), scratch)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have one order of memory. The stride of a dimension of 1 says nothing."""
    return all(x == y or size == 1 for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True))


def _gradient(param: Tensor) -> Tensor | None:
    """This rank's gradient, in the weight's order of memory (in which autograd and DDP nearly always give it)."""
    if param.grad is None:
        return None
    if isinstance(param, DTensor) and isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
        raise TypeError(f"a gradient is {param.grad.placements} where its weight is {param.placements}")
    gradient, weight = local(param.grad), local(param)
    if same_order(gradient, weight):
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def addresses_of(gradients: Iterable[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """None where there is no gradient; an empty one is at 0 and yet there."""
    found = [None if gradient is None else gradient.data_ptr() or 1 for gradient in gradients]
    return (ctypes.c_void_p * len(found))(*found)
