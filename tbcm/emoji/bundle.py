"""The asset folder that ships with the package, written by the recipes.

teacher/            a diffusers SanaPipeline folder without text encoder (captions go through MiniLM), fp16
teacher/black_latent.safetensors   "64": scaled latent [8, 8, 8] fp32 of an all-black 64 px image
prompts.txt         captions of the training split, one a line; prompts_heldout.txt those of the held-out split
real.webp           real images for KID and FID: every held-out one and an even share of the others
real.json           their captions and splits, in the order of the tiles
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import save_file

from tbcm.emoji.autoencoder import encode
from tbcm.emoji.dataset import COLUMNS, SIZE, EmojiImages, write_atlas
from tbcm.images import to_pil
from tbcm.runtime.files import atomic_folder, atomic_path, write_json

REAL_IMAGES = 2400
STORED = torch.float16  # 11 bits of mantissa against 8 of bfloat16, and no weight comes near its range


def write_teacher(transformer: SanaTransformer2DModel, vae: AutoencoderDC, out: Path) -> None:
    """Writes `teacher/`; a reader never sees half of it."""
    pipeline = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=copy.deepcopy(vae).to("cpu", STORED),
        transformer=copy.deepcopy(transformer).to("cpu", STORED),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
    )
    with atomic_folder(out / "teacher") as folder:
        pipeline.save_pretrained(folder)
        for config in folder.glob("*/config.json"):
            _forget_where_from(config)
        # Through the weights as they are stored, since that is what encodes and decodes from now on.
        stored = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        black = encode(stored, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))[0]
        save_file({str(SIZE): black.contiguous()}, folder / "black_latent.safetensors")
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them private


def _forget_where_from(config: Path) -> None:
    """diffusers notes the folder that a model was loaded from; that says nothing to anyone else."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_data_assets(data: EmojiImages, out: Path) -> None:
    """Writes the prompts and the real images."""
    for name, held_out in (("prompts.txt", False), ("prompts_heldout.txt", True)):
        captions = sorted(entry.caption for entry in data.split(held_out).entries)
        with atomic_path(out / name) as temporary:
            temporary.write_text("\n".join(captions) + "\n", encoding="utf-8")
    chosen = real_indices([entry.held_out for entry in data.entries], REAL_IMAGES)
    write_atlas(out / "real.webp", [to_pil(data.images[i]) for i in chosen])
    rows = [{"caption": data.entries[i].caption, "held_out": data.entries[i].held_out} for i in chosen]
    write_json(out / "real.json", {"size": SIZE, "columns": COLUMNS, "images": rows})


def real_indices(held_out: list[bool], count: int) -> list[int]:
    """All held-out images and as many of the others as make `count`, spread evenly; ascending."""
    seen = [i for i, out in enumerate(held_out) if not out]
    take = min(len(seen), count - sum(held_out))
    even = {seen[j * len(seen) // take] for j in range(take)}
    return [i for i, out in enumerate(held_out) if out or i in even]
