"""What trains on both sides of the fused update: a CPU over tests/csrc (the kernels' arithmetic in loops), a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tbcm.runtime.ema import EMA
from tbcm.runtime.optimizer import build_optimizer
from tbcm.runtime.update import PlainUpdate, fused_class

CHUNK = 1 << 14  # csrc/fused_update.h
BETAS = {"adamw": (0.9, 0.99), "came": (0.9, 0.99, 0.999)}


class Side(NamedTuple):
    library: ctypes.CDLL
    device: torch.device


class Odd(nn.Module):
    """Weights of every awkward kind."""

    def __init__(self, device: torch.device, many: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random).to(device))

        self.scalar, self.empty, self.matrix = weight(), weight(0, 3), weight(7, 5)
        self.chunks, self.chunks_and_three = weight(2, CHUNK), weight(3 * CHUNK + 3)
        self.tiles, self.one_by_one, self.column = weight(130, 260), weight(9, 6, 1, 1), weight(300, 1)
        self.channels_last = nn.Parameter(weight(6, 4, 3, 3).detach().to(memory_format=torch.channels_last))
        self.unaligned = nn.Parameter(weight(200).detach()[1:180])
        self.unaligned_matrix = nn.Parameter(weight(200).detach()[3:183].view(9, 20))
        self.unused, self.unused_matrix = weight(9), weight(4, 8)
        self.frozen = nn.Parameter(torch.ones(4, device=device), requires_grad=False)
        self.many = nn.ParameterList([weight(3) for _ in range(many)])  # 448 addresses go with a launch


def set_gradients(model: nn.Module, step: int) -> None:
    """Of about unit size times 10^(step % 3 - 1), the same for every model; `unused` ones have none."""
    random = torch.Generator().manual_seed(100 + step)
    for name, param in model.named_parameters():
        if name.startswith("unused") or name == "frozen":
            continue
        value = torch.randn(param.shape, generator=random).to(param.device) * 10.0 ** (step % 3 - 1)
        if name == "unaligned":
            value = torch.cat([value.new_zeros(3), value])[3:]
        param.grad = torch.empty_like(param).copy_(value) if name == "channels_last" else value


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


class Run:
    """A model, what trains it and copies of two of its weights."""

    def __init__(
        self, side: Side, name: str, *, fused: bool, many: int = 0, max_norm: float = 1.0, **settings: Any
    ) -> None:
        self.model = Odd(side.device, many)
        trained = [param for param in self.model.parameters() if param.requires_grad]
        given = {"lr": 1e-2, "betas": BETAS[name], "weight_decay": 0.1, **settings}
        self.optimizer = build_optimizer(name, trained, **given)
        self.ema = EMA(self.model, "power", sigma_rel=0.1)
        self.copies = {name: self.model.get_parameter(name).detach().bfloat16() for name in ("matrix", "chunks")}
        arguments = self.model, self.optimizer, self.ema, max_norm, self.copies
        self.update = (
            fused_class(self.optimizer)(*arguments, library=side.library) if fused else PlainUpdate(*arguments)
        )

    def step(self, step: int, bad: float | None = None) -> None:
        set_gradients(self.model, step)
        if bad is not None:
            grad_of(self.model.matrix)[1, 1] = bad
        _, finite = self.update.clip()
        self.update.step(finite)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        found = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{name}.{key}"] = value.clone()
        found |= {f"{name}.shadow": value.clone() for name, value in self.ema.shadow.items()}
        found |= {f"{name}.copy": value.clone() for name, value in self.copies.items()}
        return found | {"updates": self.ema.updates.clone()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
