"""A complete run in miniature: teacher folder, text encoder without weights, configuration, parts of a trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline
from helpers import TINY, tiny_sana
from torch import Tensor

from tbcm.config import Config, parse_config
from tbcm.config.resolution import Size
from tbcm.models.loading import freeze
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.runtime.files import write_json
from tbcm.samples.rollouts import TextConditions
from tbcm.setup.networks import build_student
from tbcm.setup.parts import Parts
from tbcm.setup.precision import switch
from tbcm.training.trainer import Trainer

PROMPTS = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("cat", "dog", "sun")]


class HashEncoder:
    """A text encoder without weights: token states are a function of the prompt's characters."""

    dim, max_tokens = TINY["caption_channels"], 5

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        def states(prompt: str) -> Tensor:
            return torch.randn(self.max_tokens, self.dim, generator=torch.Generator().manual_seed(seed_of(prompt)))

        length = torch.tensor([min(self.max_tokens, 1 + len(p) // 3) for p in prompts])
        mask = torch.arange(self.max_tokens) < length[:, None]
        return torch.stack([states(p) for p in prompts]), mask


def tiny_config(out: Path, **sections: Any) -> Config:
    """A few steps of everything; keyword arguments update sections, `train={"steps": 3}`, or set `resolution`."""
    tree: dict[str, Any] = {
        "resolution": 64,
        "teacher": {"path": "unused", "null_mask": "own"},
        "text": {"encoder": "minilm", "max_tokens": 8},
        "data": {"prompts": "unused"},
        "method": {"guidance": [2.0, 3.0]},
        "optimizer": {"name": "adamw", "lr": 1e-3, "clip": 1.0},
        "train": {"steps": 6, "prompts_per_step": 4},
        "log": {"every": 2, "preview_every": 0},
        "checkpoint": {"every": 100},
    }
    method = sections.get("method", {})
    name = method.get("name", "tbcm")
    if name in ("tbcm", "scm", "sprint"):
        tree["method"]["r"] = {"warmup_steps": 4, "final": 1.0, "cooldown_start": None}
    if name == "tbcm" or (name in ("lcm", "pcm") and method.get("samples") != "images"):
        tree["method"]["route"] = {"points": 4, "per_prompt": True}
    elif name != "dmd2" or method.get("adversary") is not None:
        tree["data"]["images"] = "unused"
    for name, update in sections.items():
        old = tree.get(name, {})
        tree[name] = {**old, **update} if isinstance(old, dict) else update
    return parse_config({"out": str(out), **tree}, "tiny")


class TinyLatents:
    """A clean latent for each of the prompts, a function of its text."""

    captions = PROMPTS

    def __len__(self) -> int:
        return len(self.captions)

    def latents(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        made = [torch.Generator().manual_seed(seed_of(self.captions[i])) for i in indices]
        return torch.stack([torch.randn(latent_shape(size), generator=generator) for generator in made]), list(indices)


def latent_shape(size: Size) -> tuple[int, int, int]:
    return 4, size[0] // 8, size[1] // 8


def seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def tiny_parts(config: Config, **backbone: Any) -> Parts:
    compiled = switch(config.teacher.compile, torch.device("cpu"))
    teacher = SanaTrigFlow(tiny_sana(**backbone), timestep_scale=1.0, differentiable=False, compiled=compiled)
    freeze(teacher)
    text = TextConditions(HashEncoder(), config.teacher.null_mask)
    latents = TinyLatents() if config.method.from_images else None
    black = {size: torch.zeros(latent_shape(size)) for size in config.resolution}
    return Parts(teacher, build_student(config, teacher), text, PROMPTS, black, latents)


def tiny_vae() -> AutoencoderDC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            encoder_layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            encoder_qkv_multiscales=((),) * 4,
            decoder_qkv_multiscales=((),) * 4,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.7,
        )


def write_teacher(folder: Path, **transformer: Any) -> Path:
    """A SanaPipeline folder with MiniLM's 384 caption channels, dense time, and no text encoder of its own."""
    SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        transformer=tiny_sana(**{"caption_channels": 384, "timestep_scale": 0.001, **transformer}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes them out."""
    tree = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def write_config(path: Path, teacher: Path, prompts: Path, out: Path, **sections: Any) -> Path:
    """The tiny configuration as a file that the command lines read (JSON is YAML)."""
    config = tiny_config(out, **sections).model_dump(mode="json")
    config["teacher"]["path"], config["data"]["prompts"] = str(teacher), str(prompts)
    write_json(path, config)
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The student's, of one step, before clipping: of every weight."""
    found: list[Tensor] = []

    def keep() -> tuple[Tensor, Tensor]:
        found.extend(p.grad.clone() for p in trainer.parameters if p.grad is not None)
        return torch.ones(()), torch.tensor(True)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.update, "clip", keep)
        trainer.train_step()
    assert len(found) == len(trainer.parameters)
    return found
