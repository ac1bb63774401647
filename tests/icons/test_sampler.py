from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tbcm.icons.autoencoder import make_autoencoder
from tbcm.icons.sampler import guided_euler, preview


def text(count: int, value: float) -> tuple[Tensor, Tensor]:
    return torch.full((count, 2, 1), value), torch.ones(count, 2, dtype=torch.bool)


def test_one_target_for_each_prompt_is_reached_exactly() -> None:
    """The straight-line flow to a point a has v = (x - a)/s; Euler steps stay on the line. With guidance w, and a and b
    the points of the prompt and of the null prompt, v = (x - (b + w (a - b)))/s is such a flow again."""

    def velocity(
        x: Tensor, embeds: Tensor, s: Tensor, encoder_attention_mask: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        assert s.min() > 0 and s.max() <= 1
        return ((x - embeds[:, :1, :, None]) / s[:, None, None, None],)

    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for guidance, target in ((0.0, -1.0), (1.0, 2.0), (4.0, 11.0)):
        out = guided_euler(velocity, noise, text(3, 2.0), text(1, -1.0), guidance, steps=5)  # type: ignore[arg-type]
        torch.testing.assert_close(out, torch.full_like(noise, target), rtol=1e-5, atol=1e-5)


def test_preview_is_a_picture_and_repeats_itself(tmp_path: Path) -> None:
    calls: list[Tensor] = []

    def still(x: Tensor, embeds: Tensor, s: Tensor, **_: object) -> tuple[Tensor]:
        calls.append(x)
        return (torch.zeros_like(x),)

    vae = make_autoencoder().eval()
    for name in ("a.png", "b.png"):
        preview(still, vae, text(3, 1.0), text(1, 0.0), ["a", "b", "c"], 2, tmp_path / name)  # type: ignore[arg-type]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").width > 3 * 64
    assert len(calls) == 2 * 2 * 20
    assert not torch.equal(calls[0], calls[20])  # every row has noise of its own
