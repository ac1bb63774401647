from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file

from tbcm.emoji.autoencoder import make_autoencoder
from tbcm.emoji.bundle import real_indices, write_data_assets, write_teacher
from tbcm.emoji.dataset import load_images, read_atlas
from tbcm.emoji.teacher import make_transformer


def test_real_images_are_all_held_out_ones_and_an_even_share_of_the_rest() -> None:
    held_out = [i % 20 == 7 for i in range(1000)]
    chosen = real_indices(held_out, 240)
    assert len(chosen) == 240 and chosen == sorted(set(chosen))
    assert sum(held_out[i] for i in chosen) == 50
    steps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(steps) <= 8  # 190 of 950, one in five, so never a gap much wider
    assert real_indices([False, True, False], 10) == [0, 1, 2]


def test_real_images_and_prompts_match_the_dataset(data: Path, tmp_path: Path) -> None:
    images = load_images(data)
    write_data_assets(images, tmp_path)
    rows = json.loads((tmp_path / "real.json").read_text())["images"]
    assert torch.equal(read_atlas(tmp_path / "real.webp", len(rows)), images.images)
    assert [row["caption"] for row in rows] == [entry.caption for entry in images.entries]
    assert {row["caption"] for row in rows if row["held_out"]} == set(
        (tmp_path / "prompts_heldout.txt").read_text().splitlines()
    )


def test_teacher_folder_replaces_an_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "stale").touch()
    vae = make_autoencoder().eval()
    write_teacher(make_transformer(), vae, tmp_path)
    assert not (tmp_path / "teacher" / "stale").exists()
    stored = AutoencoderDC.from_pretrained(tmp_path / "teacher" / "vae", torch_dtype=torch.float32)
    black = load_file(tmp_path / "teacher" / "black_latent.safetensors")["64"]
    with torch.no_grad():
        torch.testing.assert_close(black, stored.encode(torch.full((1, 3, 64, 64), -1.0)).latent[0])
    assert vae.dtype == torch.float32  # what goes on training is untouched
