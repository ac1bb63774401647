"""Dry runs of every family: from configuration files alone, with the figures of the run itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families.parts import PROMPTS
from families.test_training import CPU, of_images, tiny_encoders, written
from tiny import edit_json

from tbcm.config import Config, load_config
from tbcm.errors import UserError
from tbcm.models.families import presets
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.pipeline import Pipeline
from tbcm.models.preset_files import ARCHITECTURES, write_preset
from tbcm.setup.networks import files_of
from tbcm.setup.parts import Parts, build_parts
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.dryrun import Repeats, account, counted
from tbcm.training.holdings import holdings, tensors
from tbcm.training.random_parts import random_parts
from tbcm.training.random_text import random_encoder, random_text
from tbcm.training.trainer import Trainer

__all__ = ["tiny_encoders"]
CONFIGS = Path(__file__).parents[2] / "configs"


def small(name: str, folder: Path) -> Config:
    """A run of one prompt that is longer than the pipeline takes, in fp32 as on a CPU."""
    config = written(name, folder, prompts_per_step=1)
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


def test_its_figures_are_those_of_the_run(tmp_path: Path) -> None:
    """FLOPs of a step, what is held, and the tensors that come and go, counted on real ones: of a network whose texts
    have lengths of their own."""
    config = small("zimage", tmp_path)
    trainer, flops, peak = step(lambda: build_parts(config, CPU), config, CostCounter())
    without_weights(tmp_path / "teacher")
    with SizesAlone():
        dry = step(lambda: random_parts(config, CPU), config, CostCounter())
    assert dry[1] == flops
    assert holdings(dry[0]) == holdings(trainer)
    assert dry[2] == pytest.approx(peak, rel=0.01)


def test_of_a_baseline_with_its_autoencoder(tmp_path: Path) -> None:
    config = of_images("pixart", tmp_path, {"name": "sprint"})
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
    without_weights(tmp_path / "teacher")
    cache = config.model_copy(update={"text": config.text.model_copy(update={"cache": "unused"})})
    found = []
    for one in (config, cache):
        with SizesAlone(), CostCounter() as counter:
            text = random_text(one, open_pipeline(files_of(one)), CPU)
            condition = text(["a red panda"], (16, 16))
        found.append((condition, text.modules, counter.flops))
    (whole, encoders, flops), (stored, none, nothing) = found
    assert len(encoders) == 3 and flops > 0
    assert not none and not nothing
    assert {key: value.shape for key, value in whole.tensors.items()} == {k: v.shape for k, v in stored.tensors.items()}


@pytest.mark.parametrize(("points", "rollouts"), [(1, 1), (1, 3)])
def test_what_is_left_out_costs_what_is_run(points: int, rollouts: int, tmp_path: Path) -> None:
    """On real tensors, whose operators count the same."""
    config = with_points(written("dit", tmp_path, prompts_per_step=1, points_per_micro_batch=points), 5)
    found = []
    for repeats in (Repeats, None):
        with CostCounter() as counter:
            trainer = Trainer(config, CPU, build_parts(config, CPU))
            for parameter in trainer.parameters if rollouts > 1 else []:
                parameter.grad = torch.zeros_like(parameter)
            left_out = repeats(trainer, counter, gradients=rollouts > 1) if repeats else None
            before, counter.peak = counter.flops, counter.live
            trainer.train_step()
        more = left_out.flops if left_out else 0
        assert (more > 0) == bool(left_out)
        found.append((counter.flops - before + more, counter.peak))
    (flops, peak), (all_flops, full_peak) = found
    assert flops == all_flops
    assert peak == pytest.approx(full_peak, abs=100)  # whose terms have figures of their own, a few bytes each


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
def test_presets_have_the_published_sizes(name: str, tmp_path: Path) -> None:
    write_preset(name, tmp_path)
    pipeline = open_pipeline(Pipeline(str(tmp_path)))
    assert isinstance(pipeline, FamilyPipeline)
    with torch.device("meta"):
        encoders = [random_encoder(cls, part, pipeline) for part, cls in pipeline.encoder_classes.items()]
        nets = [pipeline.untrained(pipeline.family.network)], encoders
    found = [sum(p.numel() for net in some for p in net.parameters()) for some in nets]
    assert [count / 1e6 for count in found] == pytest.approx(PUBLISHED[name], abs=1)


HEADS, WIDTH, TEXT = 16, 16 * 72, 32


def shrink(patch: pytest.MonkeyPatch, layers: int) -> None:
    """PixArt-Sigma of few blocks, whose text is encoded in two layers."""
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
    AdamW's two moments and its average. One token of the image leaves little else but a tangent of zeros of the largest
    weight. An adapter's backbone is there once."""
    shrink(monkeypatch, layers=1)
    precisions = [f"{part}.precision=fp32" for part in ("teacher", "student", "text")]
    overrides = ["resolution=16", "train.points_per_micro_batch=1", *precisions]
    trainer, _, peak = counted(pixart(*overrides, *(["student.lora.rank=64"] if lora else [])), 1)
    frozen = sum(p.numel() for net in (trainer.teacher, *trainer.text.modules) for p in net.parameters())
    trained = sum(p.numel() for p in trainer.parameters)
    by_hand = 4 * (frozen + 5 * trained)
    assert by_hand <= peak <= 1.1 * (by_hand + 4 * max(p.numel() for p in trainer.teacher.parameters()))
    assert (trained > 0.9 * frozen) != lora


def test_the_report_says_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, layers=1)
    said = account(pixart("student.lora.rank=4"), 1, 32, ((32, 32),))
    assert "PixArt-Sigma-XL-2-1024-MS, taken to be pixart-sigma)" in said
    assert "of which 0.4 M trained" in said and "(LoRA of rank 4)" in said
    assert "32 rollout(s) of 1 prompt(s)" in said and "accounted, not measured" in said


def test_a_folder_comes_before_an_architecture(tmp_path: Path) -> None:
    small("dit", tmp_path)
    config = load_config(tmp_path / "c.yaml", ["teacher.architecture=flux-dev"])
    with SizesAlone():
        assert random_parts(config, CPU).teacher.family.pipeline == "DiTPipeline"


def test_what_a_dry_run_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.architecture = 'sd4': should be one of sana-600m, .*, flux-dev"):
        random_parts(pixart("teacher.architecture=sd4"), CPU)
    with pytest.raises(UserError, match=r"teacher.fp8=true is for Sana"):
        random_parts(pixart("teacher.fp8=true"), CPU)
    with pytest.raises(UserError, match="resolution = 20: sides should be multiples of 16"):
        random_parts(pixart("resolution=20"), CPU)
    assert {"icons", *PUBLISHED} < {*ARCHITECTURES}
