from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbcm.icons.autoencoder import encode, make_autoencoder
from tbcm.icons.caches import cached, make_latents, make_text
from tbcm.icons.colours import PAIRS, colours_of, compose, fixed_jitter
from tbcm.icons.dataset import load_drawings


def test_a_cache_is_made_again_only_when_what_it_was_made_from_changed(tmp_path: Path) -> None:
    made: list[float] = []

    def fill(array: np.memmap) -> None:
        made.append(0)
        array[:] = len(made)

    for made_from, value in (("a", 1), ("a", 1), ("b", 2)):
        found = cached(tmp_path / "x.npy", made_from, (2, 3), fill)
        assert found.dtype == torch.float16 and found.tolist() == [[value] * 3] * 2
    assert len(made) == 2


def test_latents_are_those_of_every_drawing_in_every_pair(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawings, vae = load_drawings(data), make_autoencoder().eval()
    latents = make_latents(tmp_path, drawings, vae)
    assert latents.shape == (len(drawings), len(PAIRS), 8, 8, 8)
    jitter = fixed_jitter(drawings.entries)
    image = compose(drawings.masks[2:3], colours_of(torch.tensor([5]), jitter[2, 5][None]))
    torch.testing.assert_close(latents[2, 5].float(), encode(vae, image)[0], rtol=2e-3, atol=2e-3)
    before = (tmp_path / "latents.npy").stat().st_mtime_ns
    make_latents(tmp_path, drawings, vae)
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == before
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(1)
    assert not torch.equal(make_latents(tmp_path, drawings, vae), latents)


def test_text_states_and_their_lengths(tmp_path: Path) -> None:
    class Lengths:
        """A text encoder whose only state is the number of words, one token a word."""

        max_tokens, dim = 4, 2

        def tokenizer(self, captions: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
            return {"input_ids": [caption.split()[:max_length] for caption in captions]}

        def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
            words = torch.tensor([float(len(caption.split())) for caption in captions])
            return words[:, None, None].expand(-1, 4, 2), torch.ones(len(captions), 4, dtype=torch.bool)

    text: Any = Lengths()
    states, lengths = make_text(tmp_path, ["a b", "a", "a b c d e"], text)
    assert states.shape == (3, 4, 2) and states[:, 0, 0].tolist() == [2, 1, 5]
    assert lengths.tolist() == [2, 1, 4]
