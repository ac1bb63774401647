"""The asset folder that ships with the package, written by the recipes.

teacher/            a diffusers SanaPipeline folder without text encoder (captions go through MiniLM), fp16
teacher/tbcm_teacher.yaml          its card (see `tbcm.config.card`)
teacher/black_latent.safetensors   "64": scaled latent [8, 8, 8] fp32 of an all-black 64 px image
prompts.txt         captions of combinations that are trained on, one a line; prompts_heldout.txt of those held out
drawings.webp       the drawings (see `tbcm.icons.dataset`): what real images are composed from
drawings.json       their sets, names, concepts and styles, in the order of the tiles
training.json       how many samples the teacher has seen, and its learning curve
"""

from __future__ import annotations

import copy
import json
from dataclasses import astuple
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import save_file

from tbcm.config.card import CARD
from tbcm.icons.autoencoder import encode
from tbcm.icons.captions import Catalogue, Prompt
from tbcm.icons.dataset import Drawings, chance, write_drawings
from tbcm.icons.groups import captions_of
from tbcm.icons.masks import SIZE
from tbcm.icons.sampler import SHIFT
from tbcm.runtime.files import atomic_folder, atomic_path

TEACHER_CARD = """\
# What no other file of this folder says of the teacher. Every configuration with this teacher.path begins from it.
resolution: 64
teacher:
  architecture: icons
  null_mask: own # its caption dropout replaced embedding and mask
text: {encoder: minilm, max_tokens: 16}
method: {guidance: [2.5]}
"""
STORED = torch.float16  # 11 bits of mantissa against 8 of bfloat16, and no weight comes near its range


def write_teacher(transformer: SanaTransformer2DModel, vae: AutoencoderDC, out: Path) -> None:
    """Writes `teacher/`; a reader never sees half of it."""
    pipeline = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=copy.deepcopy(vae).to("cpu", STORED),
        transformer=copy.deepcopy(transformer).to("cpu", STORED),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
    )
    with atomic_folder(out / "teacher") as folder:
        pipeline.save_pretrained(folder)
        for config in folder.glob("*/config.json"):
            _forget_where_from(config)
        # Through the weights as they are stored, since that is what encodes and decodes from now on.
        stored = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        black = encode(stored, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))[0]
        save_file({str(SIZE): black.contiguous()}, folder / "black_latent.safetensors")
        (folder / CARD).write_text(TEACHER_CARD, encoding="utf-8")
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them private


def _forget_where_from(config: Path) -> None:
    """diffusers notes the folder that a model was loaded from; that says nothing to anyone else."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_data_assets(drawings: Drawings, out: Path) -> None:
    """Writes the prompts and the drawings."""
    catalogue = Catalogue(drawings.select(unseen=False).entries)
    for name, held_out in (("prompts.txt", False), ("prompts_heldout.txt", True)):
        captions = sorted(worded(prompt) for prompt in catalogue.full(held_out))
        with atomic_path(out / name) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in captions), encoding="utf-8")
    write_drawings(drawings, out)


def worded(prompt: Prompt) -> str:
    """One of the captions that a prompt is trained with; a hash decides."""
    captions = captions_of([prompt])[prompt]
    return captions[int(len(captions) * chance("worded", *map(str, astuple(prompt))))]
