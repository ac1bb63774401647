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
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from tbcm.emoji.autoencoder import encode
from tbcm.emoji.dataset import COLUMNS, SIZE, EmojiImages, write_atlas
from tbcm.runtime.files import atomic_path

REAL_IMAGES = 2400
STORED = torch.float16  # 11 bits of mantissa against 8 of bfloat16, and no weight comes near its range


def write_teacher(transformer: SanaTransformer2DModel, vae: AutoencoderDC, out: Path) -> None:
    """Writes `teacher/`. Files are replaced one by one, each whole, so a reader never sees half of one."""
    pipeline = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=copy.deepcopy(vae).to("cpu", STORED),
        transformer=copy.deepcopy(transformer).to("cpu", STORED),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".teacher-") as temporary:
        folder = Path(temporary)
        pipeline.save_pretrained(folder)
        stored_vae = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        black = encode(stored_vae, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))[0]
        save_file({str(SIZE): black.contiguous()}, folder / "black_latent.safetensors")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = out / "teacher" / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def write_data_assets(data: EmojiImages, out: Path) -> None:
    """Writes the prompts and the real images."""
    out.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("prompts.txt", False), ("prompts_heldout.txt", True)):
        captions = sorted(entry.caption for entry in data.split(held_out).entries)
        with atomic_path(out / name) as temporary:
            Path(temporary).write_text("\n".join(captions) + "\n", encoding="utf-8")
    chosen = real_indices([entry.held_out for entry in data.entries], REAL_IMAGES)
    tiles = [Image.fromarray(np.ascontiguousarray(data.images[i].permute(1, 2, 0).numpy())) for i in chosen]
    write_atlas(out / "real.webp", tiles)
    rows = [{"caption": data.entries[i].caption, "held_out": data.entries[i].held_out} for i in chosen]
    with atomic_path(out / "real.json") as temporary:
        table = {"size": SIZE, "columns": COLUMNS, "images": rows}
        Path(temporary).write_text(json.dumps(table, ensure_ascii=False, indent=0), encoding="utf-8")


def real_indices(held_out: list[bool], count: int) -> list[int]:
    """All held-out images and as many of the others as make `count`, spread evenly; ascending."""
    seen = [i for i, out in enumerate(held_out) if not out]
    take = min(len(seen), count - sum(held_out))
    even = {seen[j * len(seen) // take] for j in range(take)}
    return [i for i, out in enumerate(held_out) if out or i in even]
