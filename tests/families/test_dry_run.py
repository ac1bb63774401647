"""Dry runs of every family: from configuration files alone, with the figures of the run itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.test_training import CPU, NAMES, of_images, tiny_encoders, written
from families.tiny import PROMPTS
from tiny import edit_json

from tbcm.config import Config, load_config
from tbcm.errors import UserError
from tbcm.models.families import presets
from tbcm.models.preset_files import ARCHITECTURES
from tbcm.setup.parts import Parts, build_parts
from tbcm.training import dryrun
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.dryrun import account, as_on_a_gpu, counted
from tbcm.training.holdings import holdings, tensors
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

__all__ = ["tiny_encoders"]
CONFIGS = Path(__file__).parents[2] / "configs"


def small(name: str, folder: Path, student: dict[str, Any] | None = None, **train: Any) -> Config:
    """A run of one prompt that is longer than the pipeline takes, in fp32 as on a CPU."""
    config = written(name, folder, student, prompts_per_step=1, **train)
    if name not in ("dit", "ddpm"):
        (folder / "prompts.txt").write_text(" ".join([PROMPTS[0]] * 1200))
    if name == "zimage":  # whose network has places for so many words
        edit_json(folder / "teacher" / "transformer" / "config.json", axes_lens=[1024, 32, 32])
    return with_points(config, 2)


def with_points(config: Config, points: int) -> Config:
    route = config.method.route.model_copy(update={"points": points})
    return config.model_copy(update={"method": config.method.model_copy(update={"route": route})})


def without_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def step(make: Callable[[], Parts], config: Config, counter: CostCounter) -> tuple[Trainer, int, int]:
    """A trainer that has taken a step; FLOPs of that, and bytes that came and went."""
    with counter:
        trainer = Trainer(config, CPU, make())
        there = [tensor.detach() for net in (trainer.teacher, *trainer.text.modules) for tensor in tensors(net)]
        gc.collect()
        flops, live, counter.peak = counter.flops, counter.live, counter.live
        trainer.train_step()
    del there
    return trainer, counter.flops - flops, counter.peak - live


KINDS = {"dit", "flux", "lumina2", "sd3", "zimage"}
"""Without text, with guidance embedded, with masks, with several encoders, with texts of their own lengths."""


@pytest.mark.parametrize("name", [*sorted(KINDS), "sdxl with adapters"])
def test_its_figures_are_those_of_the_run(name: str, tmp_path: Path) -> None:
    """FLOPs of a step, what is held, and the tensors that come and go: counted on real ones."""
    name, _, lora = name.partition(" with ")
    config = small(name, tmp_path, {"lora": {"rank": 2}} if lora else None)
    trainer, flops, peak = step(lambda: build_parts(config, CPU), config, CostCounter())
    without_weights(tmp_path / "teacher")
    with SizesAlone():
        dry = step(lambda: random_parts(config, CPU), config, CostCounter())
    assert dry[1] == flops
    assert holdings(dry[0]) == holdings(trainer)
    assert dry[2] == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("name", sorted({*NAMES} - KINDS))
def test_every_family_is_counted(name: str, tmp_path: Path) -> None:
    config = small(name, tmp_path)
    without_weights(tmp_path / "teacher")
    trainer, flops, peak = counted(config, 1)
    held = holdings(trainer)
    assert flops > 0 and peak >= sum(held.values()) and held["student"] >= held["teacher"] > 0


@pytest.mark.parametrize("method", ["scm", "sprint"])
def test_of_a_baseline_with_its_autoencoder(method: str, tmp_path: Path) -> None:
    config = of_images("sd3", tmp_path, {"name": method})
    (tmp_path / "prompts.txt").write_text("unused")
    for file in (tmp_path / "pictures").glob("*.txt"):
        file.write_text(" ".join([PROMPTS[0]] * 1200))
    config = config.model_copy(update={"resolution": ((16, 16),)})
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    with CostCounter() as counter:
        trainer.train_step()
    without_weights(tmp_path / "teacher")
    other, flops, _ = counted(config, 1)
    assert flops == counter.flops
    assert holdings(other) == holdings(trainer) and holdings(other)["VAE"] > 0


def test_text_from_a_cache_costs_no_encoder(tmp_path: Path) -> None:
    config = small("sd3", tmp_path)
    whole, flops, _ = counted(config, 1)
    config = config.model_copy(update={"text": config.text.model_copy(update={"cache": "unused"})})
    cached, fewer, _ = counted(config, 1)
    assert whole.text.modules and not cached.text.modules
    with SizesAlone(), CostCounter() as encoders:
        whole.text(["a red panda"], (16, 16))
    assert encoders.flops > 0 and flops - fewer == encoders.flops


@pytest.mark.parametrize("rollouts", [1, 3])
@pytest.mark.parametrize("points", [None, 1, 3])
def test_what_is_left_out_costs_what_is_run(
    points: int | None, rollouts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written("pixart", tmp_path, prompts_per_step=1, points_per_micro_batch=points)
    config = with_points(config, 7)
    _, flops, peak = counted(config, rollouts)

    class Nothing:
        flops = 0

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

    monkeypatch.setattr(dryrun, "Repeats", Nothing)
    assert counted(config, rollouts)[1:] == (flops, peak)


# Without a folder

PUBLISHED = {
    "sd15": (860, 123),  # 859.5 M in the U-Net
    "sdxl": (2567, 818),
    "sd35-medium": (2243, 5581),
    "flux-dev": (11901, 4885),
    "pixart-sigma": (611, 4762),
}
"""Millions of weights of the network, and of the text encoders: CLIP-L 123, OpenCLIP-G 695, T5-XXL's encoder 4,762."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_the_published_sizes(name: str) -> None:
    config = load_config(CONFIGS / "sd35.yaml", [f"teacher.architecture={name}", "teacher.path=nobody/nothing"])
    with SizesAlone():
        parts = random_parts(as_on_a_gpu(config), CPU)
    found = [sum(p.numel() for net in nets for p in net.parameters()) for nets in ([parts.teacher], parts.text.modules)]
    assert [count / 1e6 for count in found] == pytest.approx(PUBLISHED[name], abs=1)


HEADS, WIDTH, TEXT = 8, 8 * 72, 32


def shrink(patch: pytest.MonkeyPatch, layers: int) -> None:
    """PixArt-Sigma of few blocks, of half the width, whose text is encoded in two layers."""
    network, config = presets.PRESETS["pixart-sigma"]["transformer"]
    fewer = {"num_layers": layers, "num_attention_heads": HEADS, "cross_attention_dim": WIDTH, "caption_channels": TEXT}
    t5 = {"d_model": TEXT, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 100}
    changes = {"transformer": (network, config | fewer), "text_encoder": ("T5EncoderModel", t5)}
    patch.setitem(presets.PRESETS, "pixart-sigma", presets.PRESETS["pixart-sigma"] | changes)


def pixart(*overrides: str) -> Config:
    few = ["resolution=32", "train.prompts_per_step=1", "method.route.points=3"]
    return load_config(CONFIGS / "pixart.yaml", [*few, *overrides])


def test_flops_of_a_rollout_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three evaluations of both branches, of 4 tokens (2 x 2 patches) and 300 of text."""
    shrink(monkeypatch, layers=2)
    tokens, text, d = 4, 300, WIDTH
    block = (
        4 * tokens * d * d + 2 * tokens * tokens * d  # self-attention
        + 2 * tokens * d * d + 2 * text * d * d + 2 * tokens * text * d  # cross-attention
        + 8 * tokens * d * d  # feed-forward
    )  # fmt: skip
    time = 256 * d + d * d + 6 * d * d
    ends = tokens * d * (2 * 2 * 4) + tokens * d * (2 * 2 * 8) + text * (TEXT * d + d * d)
    with SizesAlone(), CostCounter() as counter:
        config = pixart("text.cache=unused")
        trainer = Trainer(config, CPU, random_parts(config, CPU))
        before = counter.flops
        next(iter(trainer.source(0)))
    assert counter.flops - before == 3 * 2 * 2 * (2 * block + time + ends)


@pytest.mark.parametrize("lora", [False, True])
def test_peak_memory_by_hand(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: the frozen weights of teacher and text encoder, and of each weight that is trained itself, its gradient,
    AdamW's two moments and its average. One token of the image leaves little else. An adapter's backbone is there once.
    """
    shrink(monkeypatch, layers=6)
    precisions = [f"{part}.precision=fp32" for part in ("teacher", "student", "text")]
    overrides = ["resolution=16", "train.points_per_micro_batch=1", *precisions]
    trainer, _, peak = counted(pixart(*overrides, *(["student.lora.rank=64"] if lora else [])), 1)
    frozen = sum(p.numel() for net in (trainer.teacher, *trainer.text.modules) for p in net.parameters())
    trained = sum(p.numel() for p in trainer.parameters)
    by_hand = 4 * (frozen + 5 * trained)
    assert by_hand <= peak <= 1.1 * by_hand
    assert (trained > 0.9 * frozen) != lora


def test_the_report_says_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, layers=2)
    said = account(pixart("student.lora.rank=4"), 1, 32, ((32, 32),))
    assert "PixArt-Sigma-XL-2-1024-MS, taken to be pixart-sigma)" in said
    assert "of which 0.3 M trained" in said and "(LoRA of rank 4)" in said
    assert "32 rollout(s) of 1 prompt(s)" in said and "accounted, not measured" in said


def test_a_folder_comes_before_an_architecture(tmp_path: Path) -> None:
    small("dit", tmp_path)
    config = load_config(tmp_path / "c.yaml", ["teacher.architecture=flux-dev"])
    with SizesAlone():
        assert random_parts(config, CPU).teacher.family.pipeline == "DiTPipeline"


def test_what_a_dry_run_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.architecture = 'sd4': should be one of sana-600m, .*, flux-dev"):
        pixart("teacher.architecture=sd4")
    with pytest.raises(UserError, match=r"teacher.fp8=true is for Sana"):
        random_parts(pixart("teacher.fp8=true"), CPU)
    with pytest.raises(UserError, match="resolution = 20: sides should be multiples of 16"):
        random_parts(pixart("resolution=20"), CPU)
    assert {"icons", *PUBLISHED} < {*ARCHITECTURES}
