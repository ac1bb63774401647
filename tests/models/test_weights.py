"""Weights that do not fit their configuration, and folders that hold variants, shards and damaged files."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json, tiny_config, write_teacher
from torch import Tensor
from transformers import Gemma2Model, PreTrainedTokenizerFast

from tbcm.errors import UserError
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.students import load_teacher
from tbcm.models.weights import choose_variant
from tbcm.setup.text import build_text

CPU = torch.device("cpu")
PARTS = "transformer", "vae", "text_encoder"
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model) -> Path:
    made = write_teacher(tmp_path / "teacher")
    tokenizer.save_pretrained(made / "tokenizer")
    gemma.save_pretrained(made / "text_encoder")
    return made


def load(folder: Path | str, part: str, **options: Any) -> Any:
    pipeline = Pipeline(str(folder), **options)
    loaders: dict[str, Callable[[torch.dtype], Any]] = {
        "transformer": pipeline.load_transformer,
        "vae": pipeline.load_vae,
        "text_encoder": lambda dtype: pipeline.load_text_encoder(dtype)[1],
    }
    return loaders[part](torch.float32)


def refused(folder: Path | str, part: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, part, **options)
    return str(caught.value)


def weights_of(folder: Path, part: str) -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def change(file: Path, edit: Callable[[Weights], Any]) -> list[str]:
    """Rewrites weights; returns the names that there were, sorted."""
    weights = load_file(file)
    names = sorted(weights)
    edit(weights)
    save_file(weights, file, {"format": "pt"})
    return names


@pytest.mark.parametrize("part", PARTS)
def test_missing_weights_are_counted_and_the_first_named(folder: Path, part: str) -> None:
    names = change(weights_of(folder, part), lambda weights: [weights.pop(name) for name in sorted(weights)[:4]])
    message = refused(folder, part)
    assert str(folder / part) in message
    assert f"4 missing ({', '.join(names[:3])}, ...)" in message


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_the_model_has_no_place_for_are_refused(folder: Path, part: str) -> None:
    change(weights_of(folder, part), lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    assert "1 not in the model (extra.weight)" in refused(folder, part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_shape_are_refused(folder: Path, part: str) -> None:
    names = change(weights_of(folder, part), lambda weights: weights.update({min(weights): torch.zeros(1, 7)}))
    assert re.search(rf"1 of another shape \({re.escape(names[0])} is \[1, 7\] and should be \[", refused(folder, part))


@pytest.mark.parametrize(
    "change", [{"qk_norm": None}, {"num_layers": 1}, {"num_layers": 3}, {"guidance_embeds": True}], ids=str
)
def test_a_configuration_of_another_teacher_is_refused(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert "do not fit config.json" in refused(folder, "transformer")


def test_buffers_that_the_model_computes_and_a_head_are_no_fault(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", interpolation_scale=1.0)
    plain = load(folder, "transformer")
    embeddings = plain.patch_embed.pos_embed.clone()
    change(weights_of(folder, "transformer"), lambda weights: weights.update({"patch_embed.pos_embed": embeddings}))
    assert torch.equal(load(folder, "transformer").patch_embed.pos_embed, embeddings)
    change(weights_of(folder, "text_encoder"), lambda weights: weights.update({"lm_head.weight": torch.zeros(260, 16)}))
    load(folder, "text_encoder")


def test_weights_in_fp8_are_rounded_ones_and_quantised_ones_are_refused(folder: Path) -> None:
    file = weights_of(folder, "transformer")
    exact = load_file(file)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in exact.items()}, file, {"format": "pt"})
    loaded = load(folder, "transformer").state_dict()
    assert all(torch.equal(loaded[name], value.to(torch.float8_e4m3fn).float()) for name, value in exact.items())
    save_file({name: value.to(torch.int8) for name, value in exact.items()}, file, {"format": "pt"})
    assert f"{file}: caption_norm.weight holds whole numbers" in refused(folder, "transformer")
    edit_json(folder / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised weights are not supported" in refused(folder, "transformer")


def test_a_text_encoder_of_another_kind_is_refused(folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", model_type="t5")
    assert "model_type = 't5'" in refused(folder, "text_encoder")


def test_a_text_encoder_of_another_width_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    teacher = {"path": str(folder), "null_mask": "own"}
    config = tiny_config(tmp_path / "run", teacher=teacher, text={"encoder": "gemma2"})
    with pytest.raises(UserError, match=r"states of width 16, and the teacher .* takes in caption_channels = 384"):
        build_text(config, CPU)


# Files


def as_variant(folder: Path, part: str, *names: str, sharded: str | None = None) -> None:
    """Writes a part's weights again as variants alone, in shards of at most `sharded`."""
    model = load(folder, part)
    config = (folder / part / "config.json").read_text()
    shutil.rmtree(folder / part)
    for name in names:
        model.save_pretrained(folder / part, variant=name, **({"max_shard_size": sharded} if sharded else {}))
    (folder / part / "config.json").write_text(config)


@pytest.mark.parametrize("sharded", [None, "20KB"])
@pytest.mark.parametrize("part", PARTS)
def test_the_only_variant_is_taken_with_a_word(
    folder: Path, part: str, sharded: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    exact = load(folder, part).state_dict()
    as_variant(folder, part, "bf16", sharded=sharded)
    assert bool(list((folder / part).glob("*-of-*"))) == bool(sharded)
    with caplog.at_level(logging.INFO, "tbcm"):
        found = load(folder, part).state_dict()
    assert all(torch.equal(found[name], value) for name, value in exact.items())
    assert [record.message for record in caplog.records if "variant" in record.message] == [
        f"{folder / part}: taking its only weights, variant bf16"
    ]


def test_of_several_variants_one_is_to_be_chosen(folder: Path) -> None:
    as_variant(folder, "transformer", "bf16", "fp16")
    assert "choose teacher.variant of bf16, fp16" in refused(folder, "transformer")
    load(folder, "transformer", variant="fp16")
    message = refused(folder, "transformer", variant="fp8")
    assert "no weights of the variant 'fp8' (teacher.variant); there are: bf16, fp16" in message
    load(folder, "vae", variant="fp16")  # which has plain ones alone


def test_variants_are_read_from_every_name_that_the_libraries_write() -> None:
    def only(*names: str) -> str | None:
        return choose_variant(names, None, "x", strict=True)

    assert only("config.json", "diffusion_pytorch_model.bf16.safetensors") == "bf16"
    assert only("diffusion_pytorch_model.safetensors.index.fp16.json") == "fp16"
    assert only("model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors") == "fp16"
    assert only("model-00001-of-00002.fp16.safetensors", "pytorch_model.fp16.bin") == "fp16"
    assert only("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors") is None
    assert only("diffusion_pytorch_model.safetensors.index.json") is None
    assert only("diffusion_pytorch_model.bin") is None
    assert only("config.json") is None


def test_a_hub_ids_variant_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_variant(folder, "transformer", "bf16")
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--sana" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    net = load_teacher(Pipeline("someone/sana"), torch.float32, CPU)
    assert net.backbone.config.num_layers == 2
    assert "no weights of the variant 'fp16'" in refused("someone/sana", "transformer", variant="fp16")
    assert "someone/other" in refused("someone/other", "transformer")


def test_files_that_are_damaged_are_named(folder: Path) -> None:
    file = weights_of(folder, "transformer")
    whole = file.read_bytes()
    for damaged in (b"", whole[:5], whole[:5000], b"\xff" * 100, b"\x00" * 100):
        file.write_bytes(damaged)
        assert f"{file}: damaged" in refused(folder, "transformer")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert f"{file}: a Git LFS pointer" in refused(folder, "transformer")
    file.unlink()
    assert str(folder / "transformer") in refused(folder, "transformer")


def test_shards_that_are_missing_or_elsewhere_are_named(folder: Path) -> None:
    model = load(folder, "transformer")
    weights_of(folder, "transformer").unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    tree = json.loads(index.read_text())
    load(folder, "transformer")
    shard = folder / "transformer" / max(tree["weight_map"].values())
    moved = shard.rename(folder / shard.name)
    assert f"{shard}: cannot be read (which {index.name} names)" in refused(folder, "transformer")
    for name in ("../" + moved.name, str(moved), "a\0b", ""):
        edit_json(index, weight_map={**tree["weight_map"], "proj_out.bias": name})
        assert f"{index}: names the file" in refused(folder, "transformer")
    for weight_map in ({}, [], {"proj_out.bias": 3}, "x"):
        edit_json(index, weight_map=weight_map)
        assert f"{index}: no index of shards" in refused(folder, "transformer")


def test_weights_in_a_bin_file_load_and_do_not_run_code(folder: Path) -> None:
    exact = load(folder, "vae").state_dict()
    weights_of(folder, "vae").unlink()
    torch.save(exact, folder / "vae" / "diffusion_pytorch_model.bin")
    assert all(torch.equal(value, exact[name]) for name, value in load(folder, "vae").state_dict().items())
    file = folder / "vae" / "diffusion_pytorch_model.bin"
    torch.save({"x": Path("code")}, file)
    assert f"{file}: holds pathlib.PosixPath beside tensors: a file that may run code" in refused(folder, "vae")
