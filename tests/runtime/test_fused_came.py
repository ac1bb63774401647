"""CAME, fused: on a CPU over tests/csrc, and on a GPU if any."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from came_by_the_book import CameByTheBook
from fused import Side
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.runtime.came import CAME
from tbcm.runtime.ema import EMA, power_function_gamma
from tbcm.runtime.fused_came import FusedCAME

SHAPES = {
    "linear": (130, 140),
    "bias": (130,),
    "one_by_one": (20, 9, 1, 1),
    "depthwise": (40, 1, 3, 3),
    "patch_embedding": (16, 4, 2, 2),
    "scale": (),
}


class Trained:
    """Weights by name, and what trains them."""

    def __init__(
        self, side: Side, weights: dict[str, Tensor], max_norm: float = math.inf, copies: Any = None, **settings: Any
    ) -> None:
        self.model = nn.ParameterDict({name: nn.Parameter(value.to(side.device)) for name, value in weights.items()})
        self.optimizer = CAME(self.model.parameters(), **{"lr": 1e-2, **settings})
        self.ema = EMA(self.model, "power", sigma_rel=0.1)
        self.update = FusedCAME(self.model, self.optimizer, self.ema, max_norm, copies, library=side.library)

    def step(self, grads: dict[str, Tensor]) -> Tensor:
        """Returns the norm."""
        for name, param in self.model.items():
            param.grad = None
            if name in grads:
                param.grad_dtype = None  # any
                param.grad = grads[name].to(param.device)
        norm, finite = self.update.clip()
        self.update.step(finite)
        return norm

    def state(self, name: str) -> dict[str, np.ndarray]:
        state = {key: value.cpu().numpy() for key, value in self.optimizer.state[self.model[name]].items()}
        return state | {"weight": self.model[name].detach().cpu().numpy()}


def test_it_is_came_and_the_ema_by_the_book(side: Side) -> None:
    """50 steps in fp64, of which some are clipped."""
    random, max_norm = torch.Generator().manual_seed(0), 3.0
    weights = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    run = Trained(side, weights, max_norm, weight_decay=0.1)
    books = {name: CameByTheBook(value.double().numpy(), 1e-2, 0.1) for name, value in weights.items()}
    shadow = {name: value.double().numpy() for name, value in weights.items()}
    gamma, norms = power_function_gamma(0.1), []
    for t in range(1, 51):
        size = 10.0 ** (t % 3 - 3)
        grads = {name: size * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
        exact = {name: grad.double().numpy() for name, grad in grads.items()}
        norms.append(math.sqrt(sum((grad**2).sum() for grad in exact.values())))
        assert run.step(grads).item() == pytest.approx(norms[-1], rel=1e-7)
        for name, book in books.items():
            theta = book.step(exact[name] * min(1, max_norm / (norms[-1] + 1e-6)))
            shadow[name] = shadow[name] + (1 - (1 - 1 / t) ** (gamma + 1)) * (theta - shadow[name])
            np.testing.assert_allclose(run.state(name)["weight"], theta, rtol=2e-5, atol=2e-5, err_msg=name)
            np.testing.assert_allclose(run.ema.shadow[name].cpu(), shadow[name], rtol=2e-5, atol=2e-5, err_msg=name)
            m = book.m.reshape(theta.shape)
            np.testing.assert_allclose(run.state(name)["momentum"], m, rtol=2e-5, atol=2e-6, err_msg=name)
    assert min(norms) < max_norm < max(norms)


@pytest.mark.parametrize("shape", [(300, 5), (7, 9, 1, 1), (4, 2, 3, 3), (300,)])
def test_an_update_is_clipped_to_a_root_mean_square_of_one(side: Side, shape: tuple[int, ...]) -> None:
    """With b1 = 0 the momentum is the update. A gradient of ones makes r = c = v = 1 - b2 = 0.5, and so u = 2^0.5,
    which is clipped; one of 0.1 after it makes v = 0.25 + 0.005, and u = 0.1 / v^0.5, which is not."""
    run = Trained(side, {"weight": torch.zeros(shape)}, betas=(0.0, 0.5, 0.9))
    for gradient, expected in ((1.0, 1.0), (0.1, 0.1 / 0.255**0.5)):
        run.step({"weight": torch.full(shape, gradient)})
        np.testing.assert_allclose(run.state("weight")["momentum"], expected, rtol=1e-6)


def test_without_any_instability_it_divides_by_its_eps(side: Side) -> None:
    """With b1 = 0 the momentum is the update: S = (1 - b3) eps2, and an update of ones moves by lr / sqrt(S)."""
    run = Trained(side, {"weight": torch.ones(130, 3)}, lr=3e-11, betas=(0.0, 0.999, 0.9999))
    run.step({"weight": torch.ones(130, 3)})
    np.testing.assert_allclose(run.state("weight")["weight"], 1 - 3e-11 / (1e-4 * 1e-16) ** 0.5, rtol=1e-6)


def test_rows_without_gradient_stay(side: Side) -> None:
    """An unused embedding row squares to 0: only eps is left, and products of two such numbers underflow in fp32."""
    run = Trained(side, {"weight": torch.ones(4, 3), "zero": torch.ones(4, 3), "bias": torch.ones(2)})
    for _ in range(3):
        rows = torch.tensor([[1.0], [0.0], [0.0], [2.0]]).expand(4, 3).clone()
        run.step({"weight": rows, "zero": torch.zeros(4, 3), "bias": torch.tensor([0.0, 1.0])})
    weight = run.state("weight")["weight"]
    assert (weight[1:3] == 1).all()
    assert (weight[0] < 1).all()
    assert np.isfinite(weight).all()
    assert (run.state("zero")["weight"] == 1).all()
    assert run.state("bias")["weight"][0] == 1


def test_sums_are_exact_to_a_few_roundings(side: Side) -> None:
    """Over columns of very different sizes, against fp64; a rounding to fp32 is 6e-8."""
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(300, 1000, generator=random) * torch.logspace(-4, 0, 1000)
    run = Trained(side, {"weight": torch.zeros(300, 1000)}, max_norm=0.5)
    norm = run.step({"weight": gradient})
    g = gradient.double().numpy()
    assert norm.item() == pytest.approx(np.sqrt((g**2).sum()), rel=1e-7)
    square = (g * 0.5 / (np.sqrt((g**2).sum()) + 1e-6)) ** 2 + 1e-30
    row, col = 1e-3 * square.mean(1), 1e-3 * square.mean(0)
    u = np.sign(g) * np.sqrt(square / np.outer(row, col) * row.mean())
    m = 0.1 * u / max(1, np.sqrt((u**2).mean()))
    instability = (9 * m) ** 2 + 1e-16
    R, C = 1e-4 * instability.mean(1), 1e-4 * instability.mean(0)
    weight = -1e-2 * m / np.sqrt(np.outer(R, C) / R.mean())
    exact = {"row": row, "col": col, "momentum": m, "instability_row": R, "instability_col": C, "weight": weight}
    for key, value in exact.items():
        np.testing.assert_allclose(run.state("weight")[key], value, rtol=1e-6, atol=0, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [False, True])
def test_bytes_a_weight(host_library: ctypes.CDLL, dtype: torch.dtype, copies: bool) -> None:
    """Of all that the passes load and store, what is made between them included.

    The gradient is read three times; weight, momentum and EMA are read and written, a matrix's momentum read once more,
    and of all else the second moment is read, written and read again. Of a matrix there are also the sums over 128 rows
    and columns of a tile, written and read, twice; the factors, read for 16 rows at a time, thrice; and the averages.
    """
    host_library.tbcm_host_bytes.restype = ctypes.c_double
    side = Side(host_library, torch.device("cpu"))

    def bytes_of(shape: tuple[int, ...], gradient: bool = True) -> float:
        weight = torch.ones(shape)
        run = Trained(side, {"weight": weight}, copies={"weight": weight.bfloat16()} if copies else None)
        host_library.tbcm_host_bytes()
        run.step({"weight": torch.ones(shape, dtype=dtype)} if gradient else {})
        return float(host_library.tbcm_host_bytes()) / weight.numel()

    of_gradients, of_copy, of_totals = 3 * dtype.itemsize, 2 * copies, 16 / 2**14
    of_sums, of_factors = 2 * 2 * (4 + 4) / 128, 3 * (4 / 16 + 4 / 128)
    rows, cols = 256, 384
    of_states = 2 * (16 / cols + 12 / rows)
    matrix = of_gradients + 28 + of_copy + of_totals + of_sums + of_factors + of_states
    assert bytes_of((rows, cols)) == pytest.approx(matrix, rel=1e-9)
    assert bytes_of((64, 64, 2, 2)) == pytest.approx(of_gradients + 36 + of_copy + of_totals, rel=1e-9)
    assert bytes_of((rows, cols), gradient=False) == pytest.approx(12 + 8 / 2**14, rel=1e-9)


def test_a_matrix_stored_by_columns_is_refused(host_library: ctypes.CDLL) -> None:
    with pytest.raises(UserError, match=r"weight weight is a matrix stored by columns: .* optimizer\.fused=false"):
        Trained(Side(host_library, torch.device("cpu")), {"weight": torch.zeros(3, 5).T})
