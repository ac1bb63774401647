"""Weights that do not fit their configuration, and folders of variants alone, of other families than Sana."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny import make
from safetensors.torch import load_file, save_file
from tiny import edit_json
from torch import Tensor

from tbcm.errors import UserError
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.writing import copy_pipeline
from tbcm.models.pipeline import Pipeline

CPU = torch.device("cpu")
PARTS = {"sd3": ["transformer", "vae", "text_encoder", "text_encoder_3"], "kolors": ["unet", "text_encoder"]}
CASES = [(name, part) for name, parts in PARTS.items() for part in parts]


def load(folder: Path, part: str, variant: str | None = None) -> Any:
    pipeline = FamilyPipeline(Pipeline(str(folder), variant=variant))
    if part == "vae":
        return pipeline.load_vae(torch.float32)
    if part == pipeline.family.network:
        return pipeline.load_network(torch.float32, CPU)
    return pipeline.load_encoders(torch.float32)[part]


def refused(folder: Path, part: str, variant: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, part, variant)
    return str(caught.value)


def change(folder: Path, part: str, edit: Callable[[dict[str, Tensor]], Any]) -> list[str]:
    """Rewrites weights; returns the names that there were, sorted."""
    (file,) = (folder / part).glob("*.safetensors")
    weights = {name: value.clone() for name, value in load_file(file).items()}
    names = sorted(weights)
    edit(weights)
    save_file(weights, file, {"format": "pt"})
    return names


@pytest.mark.parametrize(("name", "part"), CASES)
def test_weights_that_do_not_fit_are_one_line_with_the_first_names(name: str, part: str, tmp_path: Path) -> None:
    make(name).pipe.save_pretrained(tmp_path)
    stem = max(parts := [name.partition(".")[0] for name in weights_of(tmp_path, part)], key=parts.count)
    wrong = f"{stem}.surely_not"
    change(tmp_path, part, lambda weights: weights.update({wrong: torch.zeros(2)}))
    assert f"{tmp_path / part}: the weights do not fit config.json: 1 not in the model ({wrong})" in refused(
        tmp_path, part
    )
    change(tmp_path, part, lambda weights: weights.pop(wrong))
    (first, *_) = names = [name for name in weights_of(tmp_path, part) if name.endswith("weight")]
    change(tmp_path, part, lambda weights: weights.update({first: torch.zeros(1, 7)}))
    assert f"1 of another shape ({first} is [1, 7] and should be [" in refused(tmp_path, part)
    change(tmp_path, part, lambda weights: [weights.pop(name) for name in names[:4]])
    assert f"4 missing ({', '.join(names[:3])}, ...)" in refused(tmp_path, part)


def weights_of(folder: Path, part: str) -> list[str]:
    return change(folder, part, lambda weights: None)


def test_of_an_encoder_the_file_may_hold_other_heads(tmp_path: Path) -> None:
    make("sdxl").pipe.save_pretrained(tmp_path)
    exact = load(tmp_path, "text_encoder").state_dict()
    heads = {"visual_projection.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(())}
    change(tmp_path, "text_encoder", lambda weights: weights.update(heads))
    assert all(torch.equal(value, exact[key]) for key, value in load(tmp_path, "text_encoder").state_dict().items())
    change(tmp_path, "unet", lambda weights: weights.update(heads))
    assert "2 not in the model (logit_scale, visual_projection.weight)" in refused(tmp_path, "unet")


def only_variants(folder: Path, *names: str) -> None:
    """Of each file of weights these variants in the place of the plain one."""
    for file in folder.rglob("*.safetensors"):
        for name in names:
            file.with_suffix(f".{name}.safetensors").write_bytes(file.read_bytes())
        file.unlink()


def test_a_folder_of_one_variant_is_taken_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each part of it, and for the folder of a student."""
    make("sdxl").pipe.save_pretrained(tmp_path)
    parts = "unet", "vae", "text_encoder", "text_encoder_2"
    exact = {part: load(tmp_path, part).state_dict() for part in parts}
    only_variants(tmp_path, "fp16")
    teacher = FamilyPipeline(Pipeline(str(tmp_path)))
    with caplog.at_level(logging.INFO, "tbcm"):
        network = teacher.load_network(torch.float32, CPU)
        text = teacher.load_text(torch.float32, CPU)
        copy_pipeline(teacher, network, teacher.scheduler, tmp_path / "student", torch.float32)
    said = {record.getMessage() for record in caplog.records}
    assert said >= {f"{tmp_path / part}: taking its only weights, variant fp16" for part in parts}
    assert len(text.modules) == 2
    for part, wanted in exact.items():
        found = load(tmp_path / "student", part).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_of_several_variants_one_is_to_be_chosen(tmp_path: Path) -> None:
    make("sdxl").pipe.save_pretrained(tmp_path)
    only_variants(tmp_path, "bf16", "fp16")
    for part in ("unet", "vae", "text_encoder"):
        assert f"{tmp_path / part}: its weights are there as variants only" in refused(tmp_path, part)
        load(tmp_path, part, "fp16")
    assert "no weights of the variant 'fp8' (teacher.variant)" in refused(tmp_path, "unet", "fp8")


def test_another_configuration_is_refused_by_its_weights(tmp_path: Path) -> None:
    make("pixart").pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    edit_json(file, num_layers=3)
    assert "do not fit config.json" in refused(tmp_path, "transformer")
