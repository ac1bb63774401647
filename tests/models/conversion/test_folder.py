"""What a converted folder is made of besides the file, and everything that is no file to convert."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import published
import pytest
import torch
from helpers import tiny_sana
from safetensors.torch import load_file, save_file
from tiny import edit_json, write_teacher
from transformers import Gemma2Model, PreTrainedTokenizerFast

from tbcm.config.card import CARD
from tbcm.errors import UserError
from tbcm.models.conversion.folder import convert
from tbcm.models.pipeline import Pipeline

CONFIG = {"caption_channels": 384, "timestep_scale": 0.001}


@pytest.fixture
def like(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model) -> Path:
    """With a text encoder."""
    folder = write_teacher(tmp_path / "like")
    tokenizer.save_pretrained(folder / "tokenizer")
    gemma.save_pretrained(folder / "text_encoder")
    parts = {"tokenizer": ["transformers", type(tokenizer).__name__], "text_encoder": ["transformers", "Gemma2Model"]}
    edit_json(folder / "model_index.json", **parts)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(published.sana(tiny_sana(seed=1, **CONFIG)), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def on_hub(folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> str:
    """`folder` as what was once downloaded of the hub id that is returned."""
    snapshot = cache / "models--someone--sana" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return "someone/sana"


def as_variant(folder: Path, part: str, **options: Any) -> None:
    pipeline = Pipeline(str(folder))
    model = pipeline.load_vae(torch.float32) if part == "vae" else pipeline.load_text_encoder(torch.float32)[1]
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    model.save_pretrained(folder / part, variant="fp16", **options)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_parts_in_variants_alone_become_plain_ones(like: Path, file: Path, tmp_path: Path, shards: Any) -> None:
    before = {part: weights(like, part) for part in ("vae", "text_encoder")}
    for part in before:
        as_variant(like, part, **shards)
    convert(file, tmp_path / "out", str(like))
    assert not [path for path in (tmp_path / "out").rglob("*") if "fp16" in path.name]
    for part, state in before.items():
        found = weights(tmp_path / "out", part)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    pipeline = Pipeline(str(folder))
    model = pipeline.load_vae(torch.float32) if part == "vae" else pipeline.load_text_encoder(torch.float32)[1]
    return dict(model.state_dict())


def test_only_what_is_needed_of_a_hubs_pipeline_is_asked_for(
    like: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither other formats and variants, nor the network's own weights."""
    plain = load_file(like / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(plain, like / "vae" / "diffusion_pytorch_model.bin")
    save_file(plain, like / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (like / "vae" / "model.onnx").write_text("x")
    (like / "unused").mkdir()
    (like / "unused" / "config.json").write_text("{}")
    hub_id = on_hub(like, tmp_path / "hub", monkeypatch)
    asked: list[str] = []
    download = huggingface_hub.snapshot_download

    def keep(repo: str, allow_patterns: list[str] | None = None, **options: Any) -> str:
        asked.extend(allow_patterns or ())
        return str(download(repo, allow_patterns=allow_patterns, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", keep)
    convert(file, tmp_path / "out", hub_id)
    texts = sorted(path.name for path in (like / "tokenizer").iterdir())
    assert sorted(asked) == sorted(
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "transformer/config.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            *(f"tokenizer/{name}" for name in texts),
        ]
    )
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {*asked, "transformer/diffusion_pytorch_model.safetensors"}
    with pytest.raises(UserError, match="someone/other"):
        convert(file, tmp_path / "other", "someone/other")


def test_what_is_no_like(like: Path, file: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            convert(file, tmp_path / "out", str(like))
        assert not (tmp_path / "out").exists()

    (like / "text_encoder" / "model.safetensors").rename(like / "weights")
    refused(r"like: text_encoder/ has no weights, and the file holds none for it")
    (like / "text_encoder" / "model.safetensors").write_bytes(b"x" * 9)
    refused(r"text_encoder/model\.safetensors: damaged")
    shutil.rmtree(like / "text_encoder")
    refused(r"like: text_encoder/ is missing; model_index\.json names it")
    edit_json(like / "model_index.json", text_encoder=[None, None], _class_name="AnimateDiffPipeline")
    refused(r"AnimateDiffPipeline: no such family")
    (like / "model_index.json").unlink()
    refused(r"no diffusers pipeline there")


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def pickled(path: Path) -> None:
    torch.save({"state_dict": published.sana(tiny_sana(**CONFIG)), "more": Code()}, path)


def cut(path: Path) -> None:
    torch.save(published.sana(tiny_sana(**CONFIG)), path)
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.pth", pickled, r"a\.pth: holds posix\.mkdir beside tensors: a file that may run code is not read"),
        ("a.pth", cut, r"a\.pth: damaged"),
        (
            "a.pth",
            lambda path: path.write_text("<html>404</html>"),
            r"a\.pth: damaged \(nothing that torch\.save wrote",
        ),
        ("a.ckpt", lambda path: path.write_bytes(b""), r"a\.ckpt: damaged"),
        ("a.pt", lambda path: torch.save({"epoch": 3}, path), r"a\.pt: no checkpoint: there are no tensors in it"),
        ("a.pt", lambda path: torch.save([torch.ones(2)], path), r"a\.pt: no checkpoint"),
        ("a.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "LFS pointer"),
        ("a.safetensors", lambda path: path.write_text("no"), r"a\.safetensors: damaged"),
        ("a.safetensors", lambda path: None, r"a\.safetensors: cannot be read: No such file"),
        ("a.safetensors", lambda path: path.mkdir(), r"a\.safetensors: cannot be read: Is a directory"),
        ("a.gguf", lambda path: path.write_text("x"), r"a\.gguf: should be a \.safetensors file, or \.pth"),
        ("a.safetensors", lambda path: save_file({"vae.x": torch.ones(1)}, path), "holds nothing of the network"),
    ],
)
def test_what_is_no_checkpoint(
    name: str, make: Callable[[Path], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    folder = write_teacher(tmp_path / "like")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / name, tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_a_folder_that_is_not_empty_stays_as_it_is(like: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for path in (out, out / "mine.txt"):
        with pytest.raises(UserError, match="exists already"):
            convert(file, path, str(like))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    convert(file, out, str(like))
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "SanaPipeline"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        convert(file, tmp_path / "link", str(like))


def test_a_write_that_fails_leaves_nothing(
    like: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tbcm.models.conversion.folder._copy", full)
    with pytest.raises(UserError, match="the disk is full"):
        convert(file, tmp_path / "out", str(like))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "like"]


def test_a_card_goes_along(like: Path, file: Path, tmp_path: Path) -> None:
    (like / CARD).write_text("teacher: {null_mask: own}")
    convert(file, tmp_path / "out", str(like))
    assert (tmp_path / "out" / CARD).read_text() == "teacher: {null_mask: own}"
