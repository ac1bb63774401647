"""Inception and CLIP: random weights in the files' formats, since the real ones are downloads."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_files import RandomInception, write_clip, write_inception
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tbcm.errors import UserError
from tbcm.evaluation.clip import Clip
from tbcm.evaluation.inception import Inception

CPU = torch.device("cpu")


def images(count: int, size: int = 48) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_inception_features_are_the_files(tmp_path: Path) -> None:
    inception = Inception(str(write_inception(tmp_path / "i.pt")), CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RandomInception()
    with torch.no_grad():
        expected = network(images(5), return_features=True)
    torch.testing.assert_close(inception(images(5).split(2)), expected)


def test_inception_that_is_missing_or_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--inception nowhere.pt: no such file; download https"):
        Inception("nowhere.pt", CPU)
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(UserError, match=r"text.pt: is not the Inception network"):
        Inception(str(tmp_path / "text.pt"), CPU)
    with pytest.raises(UserError, match=r"\[1, 7\], not \[1, 2048\]"):
        Inception(str(write_inception(tmp_path / "small.pt", 7)), CPU)

    def unreachable(url: str, file: str) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"no network.*--inception PATH.*--metrics"):
        Inception(None, CPU)


def test_clip_scores_are_the_models_own_cosines(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    captions = ["a cat", "dog, b", "a very long caption that is cut off"]
    scores, wrong = Clip(str(folder), CPU).scores(images(3).split(2), captions)
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        captions, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    pictures = [image.permute(1, 2, 0).numpy() for image in images(3)]
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        answer = model(**tokens, pixel_values=pixels)
    cosines = (answer.logits_per_image / model.logit_scale.exp()).clamp(min=0).detach()
    torch.testing.assert_close(scores, 100 * cosines.diagonal())
    torch.testing.assert_close(wrong, 100 * torch.stack([cosines[0, 1], cosines[1, 2], cosines[2, 0]]))
    assert scores.std() > 0 and (scores - wrong).abs().min() > 1e-3


def test_clip_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no CLIP model in .*empty.*--clip.*--metrics"):
        Clip(str(tmp_path / "empty"), CPU)


def test_clip_whose_packages_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers says it, which asks for torchvision when a processor is made, not when it is imported."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ImportError("\nCLIPImageProcessor requires the Torchvision library\nhow to install it")

    monkeypatch.setattr(CLIPImageProcessor, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"requires the Torchvision library\): install.*--metrics$"):
        Clip(str(write_clip(tmp_path / "clip")), CPU)
