from __future__ import annotations

from pathlib import Path

import torch
from tiny import write_teacher

from tbcm.evaluation.stored import Tensors, fingerprint, stored
from tbcm.models.pipeline import Pipeline


class Maker:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensors:
        self.calls += 1
        return {"x": torch.full((2,), float(self.calls)).expand(3, 2)}  # a view, which safetensors does not take


def test_made_once_for_what_it_was_made_from(tmp_path: Path) -> None:
    make = Maker()
    for made_from, value in (({"a": 1}, 1.0), ({"a": 1}, 1.0), ({"a": 2}, 2.0), ({"a": 1}, 1.0)):
        assert torch.equal(stored(tmp_path, "x", made_from, make)["x"], torch.full((3, 2), value))
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    make = Maker()
    stored(tmp_path, "x", {}, make)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert stored(tmp_path, "x", {}, make)["x"][0, 0] == 2
    assert stored(tmp_path, "x", {}, make)["x"][0, 0] == 2 and make.calls == 2


def test_nothing_is_kept_without_a_folder() -> None:
    make = Maker()
    stored(None, "x", {}, make), stored(None, "x", {}, make)
    assert make.calls == 2


def test_a_fingerprint_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "a")
    before = fingerprint(Pipeline(str(folder)))
    folder.rename(tmp_path / "b")
    assert fingerprint(Pipeline(str(tmp_path / "b"))) == before
    weights = tmp_path / "b" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert fingerprint(Pipeline(str(tmp_path / "b"))) != before
