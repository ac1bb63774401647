"""Every family through the package's own commands: train, go on, export, sample, and plain diffusers on the export."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from families.tiny import BUILDERS, make
from PIL import Image

from tbcm.config import Config, load_config
from tbcm.encode_images import encode_dataset
from tbcm.errors import UserError
from tbcm.inference.exporting import export
from tbcm.inference.generation import NoiseSource, open_sampler
from tbcm.inference.student import open_origin
from tbcm.models.families import rows
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.pipeline import Pipeline
from tbcm.setup.images import build_latents
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
NAMES = sorted(set(BUILDERS) - {"sana"})
"""Sana has its own network and tests."""
NOT_EXPORTED = {"edm": "no scheduler of diffusers"}


def written(name: str, folder: Path, student: dict[str, Any] | None = None, **train: Any) -> Config:
    """The configuration of a small run of a tiny teacher, and the files that it names."""
    tiny = make(name)
    tiny.pipe.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(tiny.prompts if name == "dit" else ["a red panda", "blue cat"]))
    tree = {
        "out": str(folder / "run"),
        "resolution": tiny.size.get("height", 16 if name == "dit" else 8),
        "teacher": {"path": str(folder / "teacher")},
        "data": {"prompts": str(folder / "prompts.txt")},
        "method": {
            "guidance": [4.0] if name == "flux2" else [2.0, 4.0],  # which cannot fold it into a bias
            "route": {"points": 3, "per_prompt": True},
            "brightness_threshold": 0.0,
            "r": {"warmup_steps": 0, "final": 1.0, "cooldown_start": None},
        },
        "student": student or {},
        "optimizer": {"name": "adamw", "lr": 1e-3, "clip": 1.0},
        "train": {"steps": 3, "prompts_per_step": 2, **train},
        "log": {"preview_every": 0},
        "checkpoint": {"every": 2, "asynchronous": False},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "c.yaml")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config.to_yaml())
    return config


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.student.state_dict().items()}


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have fewer layers, and a template in fewer words, than these pipelines take for granted."""
    row = rows.FAMILIES["Flux2KleinPipeline"]
    fewer = replace(row, always={"text_encoder_out_layers": (1, 2, 3)})
    monkeypatch.setitem(rows.FAMILIES, "Flux2KleinPipeline", fewer)
    build = diffusers.QwenImagePipeline.__init__

    @functools.wraps(build)
    def with_few_words(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.prompt_template_encode, self.prompt_template_encode_start_idx = "a red {} cat", 2

    monkeypatch.setattr(diffusers.QwenImagePipeline, "__init__", with_few_words)


@pytest.mark.parametrize("name", NAMES)
def test_train_resume_export_and_sample(name: str, tmp_path: Path) -> None:
    config = written(name, tmp_path)
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert len(moved) > len(after) / 2 and all(value.isfinite().all() for value in after.values())
    again = Trainer(config, CPU, build_parts(config, CPU))  # from the checkpoint of step 2, for the third is redone
    (tmp_path / "run" / "checkpoints" / "step-00000003").rename(tmp_path / "later")
    again.resume()
    assert again.step == 2
    again.run()
    for key, value in weights(again).items():
        assert torch.equal(value, after[key]), key
    prompts = (tmp_path / "prompts.txt").read_text().split("\n")
    sampled_and_exported(name, prompts, tmp_path)


def sampled_and_exported(name: str, prompts: list[str], tmp_path: Path) -> None:
    """A run's latents, and those of its export, here and with diffusers."""
    ours = open_sampler(str(tmp_path / "run"), device="cpu")
    latents = ours.latents(prompts[:1], steps=1, seed=3)
    assert latents.shape[1:] == ours.shape and latents.isfinite().all()
    if name in NOT_EXPORTED:
        with pytest.raises(UserError, match=NOT_EXPORTED[name]):
            export(str(tmp_path / "run"), tmp_path / "out", dtype=torch.float32)
        assert not (tmp_path / "out").exists()
        return
    export(str(tmp_path / "run"), tmp_path / "out", dtype=torch.float32)
    theirs = open_sampler(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(theirs.latents(prompts[:1], steps=1, seed=3), latents, rtol=1e-3, atol=1e-4)
    by_diffusers(tmp_path / "out", prompts[:1], latents)


def test_videos(tmp_path: Path) -> None:
    """Of several frames, which latents and images have one below the other."""
    config = written("wan", tmp_path).model_copy(update={"frames": 5})
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    (black,) = trainer.parts.black.values()
    pipeline = open_origin(str(tmp_path / "run")).pipeline
    assert isinstance(pipeline, FamilyPipeline) and pipeline.channels[1] == 3  # of the first, and of two each
    assert black.shape == (pipeline.channels[0], 3 * 16 // pipeline.compression, 16 // pipeline.compression)
    pixels = pipeline.decode(pipeline.load_vae(torch.float32), black[None])
    assert pixels.shape == (1, 3, 5 * 16, 16)
    trainer.run()
    sampled_and_exported("wan", ["a red panda"], tmp_path)
    assert open_sampler(str(tmp_path / "out"), device="cpu")(["a red panda"], steps=1).shape == (1, 3, 80, 16)
    refused = (4, "wan", "should be 1, 3, 5, ..."), (5, "sd3", "StableDiffusion3Pipeline makes images")
    for frames, name, words in refused:
        make(name).pipe.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=words):
            FamilyPipeline(Pipeline(str(tmp_path / name), frames=frames)).check_size((16, 16))


def of_images(name: str, folder: Path, method: dict[str, Any]) -> Config:
    """The same run, of a baseline: on three pictures of several shapes."""
    written(name, folder)
    (folder / "pictures").mkdir()
    for i in range(3):
        picture = torch.randint(256, (30 - 4 * i, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(picture.numpy()).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text("a red panda" if i else "blue cat")
    tree = yaml.safe_load((folder / "c.yaml").read_text())
    r = {"warmup_steps": 0, "final": 1.0, "cooldown_start": None}
    tree |= {"method": {"guidance": [2.0, 4.0], "r": r, **method}, "resolution": [[16, 16], [24, 16]]}
    tree["data"]["images"] = str(folder / "pictures")
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "c.yaml")


@pytest.mark.parametrize("name", ["sd3", "sdxl", "pixart"])
def test_scm(name: str, tmp_path: Path) -> None:
    config = of_images(name, tmp_path, {"name": "scm"})
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    assert_moves(trainer)
    (batch,) = trainer.source(0)
    assert batch.trajectory.x.shape[1] == 1 and batch.trajectory.dxdt.isfinite().all()


def test_latents_are_computed_once_by_any_autoencoder(tmp_path: Path) -> None:
    config = of_images("flux", tmp_path, {"name": "scm"}).model_copy(update={"resolution": ((24, 16),)})
    encode_dataset(config, str(tmp_path / "latents"), CPU, dtype="float32", batch=2)
    data = config.data.model_copy(update={"images": None, "latents": str(tmp_path / "latents")})
    stored, vae = build_latents(config.model_copy(update={"data": data}), CPU)
    made, _ = build_latents(config, CPU)
    (ours, _), (theirs, _) = (source.latents([2, 0, 1], (24, 16)) for source in (stored, made))
    assert vae is None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux"])
def test_sprint(name: str, tmp_path: Path) -> None:
    """Its discriminator sees the frozen teacher's tokens of the image, of each block's own output."""
    config = of_images(name, tmp_path, {"name": "sprint", "adversary": {"lr": 1e-3}})
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    heads = trainer.method.beside["discriminator"].net
    before = {key: value.clone() for key, value in heads.state_dict().items()}
    assert_moves(trainer)
    assert any(not torch.equal(value, before[key]) for key, value in heads.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


@pytest.mark.parametrize("name", ["sd3", "sdxl", "edm"])
def test_lcm(name: str, tmp_path: Path) -> None:
    """On trajectories; its target network is one of its own, hooks and all."""
    config = written(name, tmp_path)
    tree = yaml.safe_load((tmp_path / "c.yaml").read_text())
    tree["method"] = {"name": "lcm", "guidance": [2.0, 4.0], "route": {"points": 3}, "target_decay": 0.5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "c.yaml")
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    trainer.run()
    ours = open_sampler(str(tmp_path / "run"), device="cpu")
    assert ours.latents(["a red panda"], steps=2).isfinite().all()
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    assert_moves(trainer)
    mine, target = weights(trainer), trainer.method.beside["target"].net.state_dict()
    assert any(not torch.equal(value, target[key]) for key, value in mine.items())
    assert all(value.isfinite().all() for value in (*mine.values(), *target.values()))


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_dmd2(name: str, tmp_path: Path) -> None:
    """Its fake network is one of its own."""
    written(name, tmp_path)
    tree = yaml.safe_load((tmp_path / "c.yaml").read_text())
    tree["method"] = {"name": "dmd2", "guidance": [2.0, 4.0], "steps": 2, "fake": {"lr": 1e-3, "updates": 2}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "c.yaml")
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    fake = trainer.method.beside["fake"].net
    before = {key: value.clone() for key, value in fake.state_dict().items()}
    assert_moves(trainer)
    moved = [key for key, value in fake.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > len(before) / 2 and all(value.isfinite().all() for value in fake.state_dict().values())


def assert_moves(trainer: Trainer) -> None:
    before = weights(trainer)
    for _ in range(3):
        trainer.train_step()
    after = weights(trainer)
    assert sum(not torch.equal(value, before[key]) for key, value in after.items()) > len(after) / 2
    assert int(trainer.guard.total) == 0


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("sdxl", None, "U-Net differ in width .* choose method.name=scm"),
        ("auraflow", [2], "block 2 of AuraFlowPipeline"),
    ],
)
def test_what_no_discriminator_can_look_at(name: str, layers: list[int] | None, words: str, tmp_path: Path) -> None:
    config = of_images(name, tmp_path, {"name": "sprint", "adversary": {"layers": layers}})
    with pytest.raises(UserError, match=words):
        Trainer(config, CPU, build_parts(config, CPU)).train_step()


def by_diffusers(folder: Path, prompts: list[str], latents: torch.Tensor) -> None:
    """The exported folder's own pipeline, from the same noise."""
    pipeline = open_origin(str(folder)).pipeline
    assert isinstance(pipeline, FamilyPipeline)
    draws_the_same(diffusers.DiffusionPipeline.from_pretrained(folder), pipeline, prompts, latents)


def draws_the_same(pipe: Any, pipeline: FamilyPipeline, prompts: list[str], latents: torch.Tensor) -> None:
    """`pipe`, with its scheduler, in one step."""
    pipe.set_progress_bar_config(disable=True)
    noise = NoiseSource(3, range(1), latents.shape[1:], CPU)()
    below = math.prod(pipeline.channels[1:])  # a video's frames
    size = latents.shape[-2] // below * pipeline.compression, latents.shape[-1] * pipeline.compression
    shape = pipeline.codec.shape(*size)
    packed = pipeline.family.layout.pack(noise, shape)
    packed = torch.stack(packed) if isinstance(packed, list) else packed
    network = getattr(pipe, pipeline.family.network)
    forward, step, found = network.forward, pipe.scheduler.step, []

    def network_on_our_noise(*args: Any, **kwargs: Any) -> Any:
        name = pipeline.family.sample
        given = kwargs.pop(name) if name in kwargs else args[0]
        rest = args if name in kwargs or len(args) == 0 else args[1:]
        rows = len(given)
        ours = list(packed[:rows]) if isinstance(given, list) else packed.expand(rows, *packed.shape[1:])
        return forward(ours, *rest, **kwargs)

    def step_from_our_noise(answer: Any, t: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ours = packed.reshape(-1, *sample.shape[1:]).expand(sample.shape).to(sample.dtype)
        out = step(answer, t, ours, *args, **kwargs)
        found.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    network.forward, pipe.scheduler.step = network_on_our_noise, step_from_our_noise
    few = pipeline.few_steps(1, size)
    guidance = {"guidance_scale": 4.0} if pipeline.family.guidance else {}
    pipe(
        **pipeline.family.prompts(prompts),
        **few.arguments,
        **guidance,
        **pipeline.family.sized_call(size),
        output_type="np",
    )
    assert len(found) == 1
    theirs = pipeline.family.layout.unpack(found[0], shape)[: len(prompts)].float()
    torch.testing.assert_close(theirs, latents, rtol=1e-3, atol=1e-3)
