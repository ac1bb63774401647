"""The baselines' batches: latents, noised, the same whatever the number of ranks and the size of a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NoHostSync
from scipy.stats import kstest, norm
from tiny import PROMPTS, metrics, tiny_config, tiny_parts, tiny_vae
from torch import Tensor

from tbcm.config.methods import Scm, Times
from tbcm.config.resolution import Size
from tbcm.errors import UserError
from tbcm.models.pipeline import Pipeline
from tbcm.runtime import distributed
from tbcm.samples.noised import NoisedLatents, VaeLatents
from tbcm.samples.rollouts import Batch, GuidedTeacher, draw
from tbcm.setup.parts import Parts
from tbcm.training.trainer import Trainer

SIZE = 64, 64

CPU = torch.device("cpu")
SIGMA, T_MAX, PER_STEP = 0.5, math.pi / 2, 4


class Images:
    """An image for each of the tiny prompts: a function of its caption; and what was asked for."""

    captions: Sequence[str] = PROMPTS

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        self.asked += indices
        return torch.stack([picture(self.captions[i]) for i in indices])


def picture(caption: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little")
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts(tiny_config(Path("unused")))


FILES = Pipeline("unused")
VAE = tiny_vae().eval().requires_grad_(False)


def make(parts: Parts, **options: Any) -> NoisedLatents:
    arguments = {
        "shapes": {SIZE: parts.black[SIZE].shape},
        "device": CPU,
        "method": Scm(name="scm", guidance=[2.0, 3.0]),
        "t_max": T_MAX,
        "seed": 0,
        "prompts_per_step": PER_STEP,
    }
    teacher = GuidedTeacher(parts.teacher, parts.text, nullcontext, [SIZE])
    return NoisedLatents(teacher, parts.text, VaeLatents(FILES, VAE, Images(), CPU), **{**arguments, **options})


def joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """All tensors of the batches, end to end."""
    found = [
        {**vars(b.trajectory), **{f"text/{k}": v for k, v in b.condition.tensors.items()}, "keep": b.keep}
        for b in batches
    ]
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


def assert_same(batches: Sequence[Batch], whole: Sequence[Batch]) -> None:
    for name, tensor in joined(batches).items():
        torch.testing.assert_close(tensor, joined(whole)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_is_noised_latents_with_the_guided_teachers_velocity(parts: Parts) -> None:
    (batch,) = make(parts)(3)
    path, n = batch.trajectory, PER_STEP
    assert path.x.shape == path.dxdt.shape == (n, 1, 4, 8, 8) and path.t.shape == (n, 1)
    assert batch.keep.tolist() == [True] * n
    states = torch.stack([parts.text([c], SIZE).tensors["embeds"][0] for c in PROMPTS])  # which captions are these?
    captions = [PROMPTS[int((states == e).flatten(1).all(1).nonzero())] for e in batch.condition.tensors["embeds"]]
    assert len(set(captions)) == n
    xbar0 = torch.cat([FILES.encode(VAE, picture(c)[None]) for c in captions])  # in scaled latent units
    torch.testing.assert_close(path.x0, SIGMA * xbar0, rtol=1e-4, atol=1e-5)
    t = path.t[:, 0, None, None, None]
    x = path.x[:, 0]
    z = (x - t.cos() * path.x0) / t.sin()
    noise = draw(0, 3, n, (4, 8, 8), [2.0, 3.0], lambda _: torch.empty(0), CPU).noise
    torch.testing.assert_close(z, SIGMA * noise, rtol=1e-3, atol=1e-3)
    null = parts.text.null_prompt(SIZE).expand(n)
    cond, uncond = (parts.teacher(x / SIGMA, path.t[:, 0], c).F for c in (batch.condition, null))
    w = path.guidance[:, None, None, None]
    torch.testing.assert_close(path.dxdt[:, 0], SIGMA * (uncond + w * (cond - uncond)), rtol=1e-4, atol=1e-5)
    assert not any(tensor.requires_grad for tensor in joined([batch]).values())


def test_an_epoch_shows_every_image_once(parts: Parts) -> None:
    batches = make(parts, prompts_per_step=3)
    for step in range(len(PROMPTS) // 3):
        list(batches(step))
    assert sorted(batches.latents.images.asked) == list(range(len(PROMPTS)))  # type: ignore[attr-defined]


def test_draws_are_a_function_of_seed_and_step(parts: Parts) -> None:
    a, again, later, other = (joined(list(make(parts, seed=s)(step))) for s, step in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert all(torch.equal(a[name], again[name]) for name in a)
    for name in ("x", "t", "dxdt"):
        assert not torch.isclose(a[name], later[name]).all() and not torch.isclose(a[name], other[name]).all()
    assert len(a["t"].unique()) == PER_STEP


def test_times_are_logit_normal_and_guidance_is_drawn_from_the_configured(parts: Parts) -> None:
    method = Scm(name="scm", times=Times(mean=-0.5, std=1.2), guidance=[2.0, 3.0])
    data = make(parts, method=method, prompts_per_step=1000)
    drawn = data._draw(0, data.shapes[SIZE])
    t = drawn.route[:, 0]
    assert drawn.route.shape == (1000, 1) and (t > 0).all() and (t <= torch.tensor(T_MAX)).all()
    assert kstest(torch.log(SIGMA * torch.tan(t.double())), norm(-0.5, 1.2).cdf).pvalue > 0.01
    counts = {w: int((drawn.guidance == w).sum()) for w in (2.0, 3.0)}
    assert sum(counts.values()) == 1000 and min(counts.values()) > 400


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 4), (2, [2, 2]), (3, [3, 1]), (9, [4])])
def test_batches_in_parts_are_the_whole(parts: Parts, at_once: int, sizes: list[int]) -> None:
    data = make(parts, prompts_at_once=at_once)
    batches = list(data(2))
    assert [len(b.keep) for b in batches] == [len(b.condition) for b in batches] == sizes
    assert data.batches == len(sizes)
    assert_same(batches, list(make(parts)(2)))


@pytest.mark.parametrize(("world", "at_once"), [(2, None), (2, 1), (4, None)])
def test_the_number_of_ranks_does_not_change_the_run(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, world: int, at_once: int | None
) -> None:
    whole = list(make(parts)(5))
    batches = []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = make(parts, prompts_at_once=at_once)
        batches += data(5)
        assert len(data.latents.images.asked) == PER_STEP // world  # type: ignore[attr-defined]
    assert_same(batches, whole)
    with pytest.raises(UserError, match="5 prompts a step cannot be shared"):
        make(parts, prompts_per_step=5)


def trainer(out: Path, **options: Any) -> Trainer:
    config = tiny_config(
        out, method={"name": "scm"}, data={"images": "unused"}, train={"steps": 3, **options}, log={"every": 1}
    )
    return Trainer(config, CPU, replace(tiny_parts(config), latents=VaeLatents(FILES, VAE, Images(), CPU), vae=VAE))


def test_the_trainer_trains_on_them(tmp_path: Path) -> None:
    whole, in_parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts", prompts_per_micro_batch=3)
    before = whole.student.backbone.proj_out.weight.detach().clone()
    for run in (whole, in_parts):
        run.run()
    after = whole.student.backbone.proj_out.weight.detach()
    assert not torch.equal(before, after)
    rows, rows_in_parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    for row, row_in_parts in zip(rows, rows_in_parts, strict=True):
        assert row["kept"] == 1.0 and row["skipped_updates"] == 0 and row["grad_norm"] > 0
        for name in ("loss", "error", "grad_norm"):
            assert row_in_parts[name] == pytest.approx(row[name], rel=1e-2)


def test_nothing_is_read_from_the_device(parts: Parts) -> None:
    data = make(parts, prompts_at_once=2)
    with NoHostSync():
        assert len(list(data(0))) == 2
    with pytest.raises(AssertionError, match="in a step"), NoHostSync():
        torch.ones(()).item()
