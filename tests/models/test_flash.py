"""flash-attn in a frozen network, over a stand-in of its real signature (flash_attn 2.8)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families.test_training import written
from torch import Tensor
from torch.nn import functional

from tbcm.config import load_config
from tbcm.errors import UserError
from tbcm.models import flash
from tbcm.models.flash import FlashAttention, installed, takes
from tbcm.setup.networks import build_teacher, pipeline_of
from tbcm.setup.text import build_text
from tbcm.training.trainer import describe

CPU = torch.device("cpu")

CALLS: list[dict[str, Any]] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """[B, T, heads, D], of fewer heads in k and v where several queries share one."""
    CALLS.append({"shape": tuple(q.shape), "causal": causal})
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).double() for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).to(q.dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, for tensors of a CPU."""
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.__spec__ = importlib_spec()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "_on_gpu", lambda tensor: True)
    installed.cache_clear()
    CALLS.clear()
    yield
    installed.cache_clear()


def importlib_spec() -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec("flash_attn", None)


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_it_is_torchs_attention(options: dict[str, Any]) -> None:
    q, k, v = heads(2, 4, 6, 8), heads(2, 4, 6, 8), heads(2, 4, 6, 8)
    right = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    with FlashAttention():
        found = functional.scaled_dot_product_attention(q, k, v, **options)
    assert [call["shape"] for call in CALLS] == [(2, 6, 4, 8)]
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("stand_in")
def test_heads_may_be_shared() -> None:
    q, k, v = heads(2, 4, 6, 8), heads(2, 2, 5, 8), heads(2, 2, 5, 8)
    with FlashAttention():
        found = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    right = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert len(CALLS) == 1
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 4, 6, 8)] * 3, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}),
        ([(2, 4, 6, 8)] * 3, {"dropout_p": 0.5}),
        ([(2, 4, 6, 264)] * 3, {}),
        ([(4, 6, 8)] * 3, {}),
        ([(2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8)], {"is_causal": True}),
    ],
)
def test_what_it_cannot_take_stays_with_torch(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    with FlashAttention():
        functional.scaled_dot_product_attention(*(heads(*shape) for shape in shapes), **options)
    assert not CALLS
    assert not takes(*(heads(2, 4, 6, 8, dtype=torch.float32) for _ in range(3)))


def test_tensors_of_a_cpu_are_not_for_it() -> None:
    assert not takes(*(heads(2, 4, 6, 8) for _ in range(3)))


def test_without_the_package_there_is_none_and_a_broken_one_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed() is None
    with pytest.raises(ValueError, match="not installed"):
        FlashAttention()
    installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: importlib_spec())
    broken = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    assert installed() is None
    assert "flash-attn is installed and does not load: cannot import name" in caplog.text
    installed.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_a_teacher_of_another_family_takes_it(tmp_path: Path) -> None:
    written("sd3", tmp_path)
    overrides = ["teacher.precision=bf16", "teacher.compile=false"]
    nets = [
        build_teacher(load_config(tmp_path / "c.yaml", [*overrides, f"teacher.flash={on}"]), CPU)
        for on in ("false", "true")
    ]
    config = load_config(tmp_path / "c.yaml", overrides)
    condition = build_text(config, CPU)(["a red panda"], (16, 16))
    u = torch.randn(1, *pipeline_of(config).latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, ours = (net(u, torch.ones(1), condition).F for net in nets)
    assert CALLS
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)
    lines = [describe(config, CPU, net) for net in nets]
    assert ["flash-attn" in line for line in lines] == [False, True]


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    written("sd3", tmp_path)
    installed.cache_clear()
    with pytest.raises(UserError, match=r"teacher\.flash=true: flash-attn is not installed.*pip install tbcm\[flash\]"):
        build_teacher(load_config(tmp_path / "c.yaml", ["teacher.flash=true"]), CPU)
    with pytest.raises(UserError, match=r"teacher\.flash=true: Sana has no attention"):
        build_teacher(load_config("configs/icons.yaml", ["teacher.flash=true"]), CPU)
