from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_files import write_mjhq
from PIL import Image

from tbcm.errors import UserError
from tbcm.evaluation.references import open_reference


def test_mjhq_layout(tmp_path: Path) -> None:
    reference = open_reference(write_mjhq(tmp_path))
    assert len(reference) == 6 and reference.captions[3] == "a grey thing, number 3"
    images = reference.images([4, 1], (32, 32))
    assert images.shape == (2, 3, 32, 32)
    expected = torch.tensor([160.0, 40.0]) / 127.5 - 1
    torch.testing.assert_close(images.mean((1, 2, 3)), expected, rtol=0, atol=0.02)


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n')
    reference = open_reference(tmp_path)
    assert list(reference.captions) == ["red"]
    assert torch.equal(reference.images([0], (8, 8))[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        open_reference(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither MJHQ-30k's meta_data.json nor a metadata.jsonl"):
        open_reference(tmp_path)
    folder = write_mjhq(tmp_path)
    (folder / "people" / "id3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 6 images are missing, the first is .*people/id3.jpg"):
        open_reference(folder)
    for text in ("[1]", "{", '{"id0": {"category": "animals"}}'):
        (folder / "meta_data.json").write_text(text)
        with pytest.raises(UserError, match=r"meta_data.json: is not"):
            open_reference(folder)
