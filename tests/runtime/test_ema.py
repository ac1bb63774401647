from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tbcm.errors import UserError
from tbcm.runtime.ema import EMA, power_function_gamma

FINITE, SKIPPED = torch.tensor(True), torch.tensor(False)


class Model(nn.Module):
    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), value, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.full((2,), 9.0))

    def set(self, value: float) -> Model:
        self.weight.data.fill_(value)
        return self


def averaged(ema: EMA) -> float:
    values = ema.shadow["weight"]
    assert (values == values[0, 0]).all()
    return float(values[0, 0])


def test_gamma_gives_the_wanted_relative_width() -> None:
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = power_function_gamma(sigma_rel)
        # The profile is the density (gamma + 1) tau^gamma on [0, 1]; its moments E tau^k = (gamma + 1)/(gamma + k + 1).
        mean, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert math.sqrt(second - mean**2) == pytest.approx(sigma_rel, rel=1e-6)
    assert power_function_gamma(0.05) == pytest.approx(16.97, abs=5e-3)  # the paper's figures
    assert power_function_gamma(0.10) == pytest.approx(6.94, abs=5e-3)


def test_power_ema_of_a_sequence_is_its_closed_form() -> None:
    """prod_{j=k+1..T} (1 - 1/j)^g telescopes to (k/T)^g: weight k counts (k/T)^g - ((k-1)/T)^g."""
    values = np.random.default_rng(0).normal(size=200)
    ema, model = EMA(Model(), "power", sigma_rel=0.1), Model()
    power = power_function_gamma(0.1) + 1
    for count, value in enumerate(values, 1):
        ema.update(model.set(value), FINITE)
        if count in (1, 2, 10, 200):
            shares = (np.arange(1, count + 1) / count) ** power - (np.arange(count) / count) ** power
            assert averaged(ema) == pytest.approx((shares * values[:count]).sum(), abs=1e-5)


def test_power_ema_keeps_its_precision_late_in_a_long_run() -> None:
    ema = EMA(Model(0.0), "power", sigma_rel=0.05)
    ema.updates.fill_(999_999)
    ema.update(Model(1.0), FINITE)
    exact = -math.expm1((power_function_gamma(0.05) + 1) * math.log1p(-1e-6))
    assert averaged(ema) == pytest.approx(exact, rel=1e-5)  # 1.8e-5; as 1 - (1 - 1/t)^k in fp32 it is 6 % off


def test_halflife_halves_the_distance() -> None:
    ema, model = EMA(Model(1.0), "halflife", halflife=20, ramp_up=None), Model(0.0)
    for _ in range(20):
        ema.update(model, FINITE)
    assert averaged(ema) == pytest.approx(0.5, rel=1e-5)


def test_halflife_ramps_up() -> None:
    ema, model = EMA(Model(), "halflife", halflife=10, ramp_up=0.5), Model()
    expected = 0.0
    for count in range(1, 60):  # the ramp ends at 0.5 x 20 = 10 updates
        beta = 0.5 ** (1 / min(10, 0.5 * count))
        expected = beta * expected + (1 - beta) * count
        ema.update(model.set(count), FINITE)
        assert averaged(ema) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["power", "halflife"])
@pytest.mark.parametrize("taken", [0, 3])
def test_a_skipped_update_changes_nothing(kind: str, taken: int) -> None:
    ema, model = EMA(Model(), kind), Model()
    for value in range(taken):
        ema.update(model.set(value + 0.3), FINITE)
    before, count = ema.shadow["weight"].clone(), int(ema.updates)
    ema.update(model.set(5.0), SKIPPED)
    assert torch.equal(ema.shadow["weight"], before)
    assert int(ema.updates) == count == taken


def test_only_trainable_weights_are_kept_and_in_fp32() -> None:
    ema = EMA(Model(1.0, torch.bfloat16))
    assert set(ema.shadow) == {"weight"}
    assert ema.shadow["weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_puts_the_average_in_and_the_weights_back(dtype: torch.dtype) -> None:
    model = Model(dtype=dtype)
    ema = EMA(model)
    ema.shadow["weight"].fill_(1.001)
    model.weight.data.normal_()
    own, shadow = model.weight.detach().clone(), ema.shadow["weight"].clone()
    place = model.weight.data_ptr()
    with pytest.raises(ZeroDivisionError), ema.swap(model):  # noqa: PT012
        assert torch.equal(model.weight, shadow.to(dtype))
        assert model.weight.data_ptr() == place  # captured graphs and optimisers hold on to the storage
        assert (model.frozen == 7).all()
        assert (model.buffer == 9).all()
        raise ZeroDivisionError
    assert torch.equal(model.weight, own)
    assert torch.equal(ema.shadow["weight"], shadow)


def test_state_continues_bit_for_bit() -> None:
    model = Model()
    ema, other = EMA(model), EMA(model)
    for value in (1.0, 2.0, 0.5):
        ema.update(model.set(value), FINITE)
    other.load_state_dict(ema.state_dict())
    for average in (ema, other):
        average.update(model.set(3.0), FINITE)
    assert torch.equal(ema.shadow["weight"], other.shadow["weight"])
    with pytest.raises(UserError, match="weight"):
        other.load_state_dict({"updates": ema.updates, "shadow": {}})


def test_wrong_numbers_are_user_errors() -> None:
    wrong: list[dict[str, Any]] = [
        {"kind": "exponential"},
        {"kind": "power", "sigma_rel": 0.3},
        {"kind": "halflife", "halflife": 0},
    ]
    for arguments in wrong:
        with pytest.raises(UserError):
            EMA(Model(), **arguments)
