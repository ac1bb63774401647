"""AdamW, fused: on a CPU over tests/csrc, and on a GPU if any."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fused import Run, Side
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tbcm.runtime.distributed import local
from tbcm.runtime.ema import EMA, power_function_gamma
from tbcm.runtime.fused_adamw import FusedAdamW
from tbcm.runtime.optimizer import build_optimizer


def test_it_is_adamw_and_the_ema_by_the_book(side: Side) -> None:
    """In fp64, from arXiv 1711.05101 (Algorithm 2) and the EMA's definition."""
    run = Run(side, "adamw", fused=True, max_norm=0.5, eps=1e-6)
    theta = {name: p.detach().cpu().double().numpy() for name, p in run.model.named_parameters() if p.requires_grad}
    theta = {name: value.copy() for name, value in theta.items()}
    m, v = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    shadow = {name: value.copy() for name, value in theta.items()}
    gamma = power_function_gamma(0.1)
    for t in range(1, 6):
        run.step(t)
        grads = {n: p.grad.cpu().double().numpy() for n, p in run.model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name in theta:
            if name in grads:
                g = grads[name] * min(1, 0.5 / (norm + 1e-6))
                theta[name] = theta[name] * (1 - 1e-2 * 0.1)
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.99 * v[name] + 0.01 * g**2
                m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.99**t)
                theta[name] = theta[name] - 1e-2 * m_hat / (np.sqrt(v_hat) + 1e-6)
            weight = 1 - (1 - 1 / t) ** (gamma + 1)
            shadow[name] = shadow[name] + weight * (theta[name] - shadow[name])
    ours = run.tensors()
    for name in theta:
        for what, value in (("", theta), (".exp_avg", m), (".exp_avg_sq", v), (".shadow", shadow)):
            tolerance = 1e-6 if what in ("", ".shadow") else 1e-8  # theta is about 1, each change about 1e-2
            np.testing.assert_allclose(ours[name + what].cpu(), value[name], rtol=2e-6, atol=tolerance, err_msg=name)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_weights(host_library: ctypes.CDLL) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def outcome(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model = nn.Linear(5, 3)
        for name, value in (("weight", torch.linspace(-1, 1, 15).view(3, 5)), ("bias", torch.zeros(3))):
            setattr(model, name, nn.Parameter(place(value)))
        ema = EMA(model)
        optimizer = build_optimizer("adamw", model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        update = FusedAdamW(model, optimizer, ema, 1.0, library=host_library)
        for _ in range(2):
            for param in model.parameters():
                param.grad = place(torch.arange(1.0, param.numel() + 1).view(param.shape))
            norm, finite = update.clip()
            assert norm == pytest.approx(math.sqrt(1240 + 14))
            update.step(finite)
        return [local(value).detach() for value in (*model.parameters(), *ema.shadow.values())]

    sharded = outcome(lambda value: distribute_tensor(value, mesh, [Shard(0)]))
    assert all(map(torch.equal, sharded, outcome(lambda value: value)))


def test_bytes_a_weight(host_library: ctypes.CDLL) -> None:
    """Gradient, weight, two moments and EMA are read, all but the gradient are written; and a copy in bf16."""
    host_library.tbcm_host_bytes.restype = ctypes.c_double
    model = nn.Linear(33, 7, bias=False)
    optimizer = build_optimizer("adamw", model.parameters(), lr=1e-2)
    copies = {"weight": model.weight.detach().bfloat16()}
    update = FusedAdamW(model, optimizer, EMA(model), 1.0, copies, library=host_library)
    model.weight.grad = torch.ones(7, 33)
    host_library.tbcm_host_bytes()
    update.step(update.clip()[1])
    assert host_library.tbcm_host_bytes() == (20 + 16 + 2) * model.weight.numel()
