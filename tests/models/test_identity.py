"""A model is known by its files: wherever they lie, and however little of another one differs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tbcm.data.sharded import differences
from tbcm.models.identity import key_of_model, model_identity, same_model

PARTS = ["text_encoder", "tokenizer"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for part in (*PARTS, "transformer"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(f'{{"of": "{part}"}}')
    (folder / "text_encoder" / "weights.safetensors").write_bytes(os.urandom(3_000_000))
    return folder


def test_the_same_files_are_the_same_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = model_identity(str(model), None, PARTS)
    (tmp_path / "link").symlink_to("model")
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "transformer" / "config.json").write_text("another")  # not asked for
    (copy / "text_encoder" / ".notes").write_text("hidden")
    monkeypatch.chdir(tmp_path / "copy")
    for path in ("../model", "../link", "../copy", ".", str(tmp_path / "link")):
        other = model_identity(path, "ignored", PARTS)
        assert same_model(identity, other) and key_of_model(identity) == key_of_model(other)
    assert not differences({"text.path": identity}, {"text.path": model_identity(".", None, PARTS)})


@pytest.mark.parametrize("change", ["weights", "config", "missing", "more", "longer"])
def test_other_files_are_another_model_even_at_the_same_path(model: Path, change: str) -> None:
    identity, weights = model_identity(str(model), None, PARTS), model / "text_encoder" / "weights.safetensors"
    if change == "weights":  # trained a little: as long as before, every layer different
        weights.write_bytes(os.urandom(3_000_000))
    elif change == "longer":
        weights.write_bytes(weights.read_bytes() + b"0")
    elif change == "config":
        (model / "tokenizer" / "config.json").write_text('{"of": "tokenizeR"}')
    elif change == "missing":
        (model / "tokenizer" / "config.json").unlink()
    else:
        (model / "tokenizer" / "added_tokens.json").write_text("{}")
    other = model_identity(str(model), None, PARTS)
    assert not same_model(identity, other) and key_of_model(identity) != key_of_model(other)
    said = differences({"text.path": identity}, {"text.path": other})
    assert said == f"text.path: {model} (files {identity['files']}) -> {model} (files {other['files']})"


def test_a_change_of_one_in_a_thousand_bytes_of_a_large_file_is_seen(model: Path) -> None:
    weights = model / "text_encoder" / "weights.safetensors"
    before = model_identity(str(model), None, PARTS)
    content = bytearray(weights.read_bytes())
    for at in range(0, len(content), 1000):
        content[at] ^= 1
    weights.write_bytes(content)
    assert not same_model(before, model_identity(str(model), None, PARTS))


def test_hub_ids_and_what_is_gone_are_known_by_their_names(model: Path) -> None:
    hub = model_identity("org/model", None, PARTS)
    assert same_model(hub, model_identity("org/model", None, PARTS))
    assert not same_model(hub, model_identity("org/model", "v2", PARTS))
    assert not same_model(hub, model_identity("org/other", None, PARTS))
    assert not same_model(hub, model_identity(str(model), None, PARTS)) and not same_model(None, hub)
    before = model_identity(str(model), None, PARTS)
    for part in PARTS:
        shutil.rmtree(model / part)
    after = model_identity(str(model), None, PARTS)  # a cache serves where the encoder is not
    assert after["files"] is None and same_model(before, after)
    assert same_model(str(model), after) and not same_model("elsewhere", after)  # what an earlier version wrote
