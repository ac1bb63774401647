from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file

from tbcm.icons.autoencoder import make_autoencoder
from tbcm.icons.bundle import worded, write_data_assets, write_teacher
from tbcm.icons.captions import Catalogue
from tbcm.icons.dataset import load_drawings
from tbcm.icons.teacher import make_transformer


def test_prompts_and_drawings_match_the_dataset(data: Path, tmp_path: Path) -> None:
    drawings = load_drawings(data)
    write_data_assets(drawings, tmp_path)
    assert torch.equal(load_drawings(tmp_path).masks, drawings.masks)
    catalogue = Catalogue(drawings.select(unseen=False).entries)
    for name, held_out in (("prompts.txt", False), ("prompts_heldout.txt", True)):
        lines = (tmp_path / name).read_text().splitlines()
        assert lines == sorted({worded(prompt) for prompt in catalogue.full(held_out)})


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
