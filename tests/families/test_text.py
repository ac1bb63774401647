"""Conditions from a saved folder, without the network and the autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families.tiny import BUILDERS, make
from torch import nn

from tbcm.errors import UserError
from tbcm.method.types import Condition
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.text import RecordedConditions
from tbcm.models.families.writing import copy_pipeline
from tbcm.models.pipeline import Pipeline


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_encoders_alone_say_what_the_whole_pipeline_says(name: str, tmp_path: Path) -> None:
    tiny = make(name)
    tiny.pipe.save_pretrained(tmp_path)
    teacher = FamilyPipeline(Pipeline(str(tmp_path)))
    family, pipe = teacher.family, teacher.load_text(torch.float32, torch.device("cpu")).pipe
    for key in ("prompt_template_encode", "prompt_template_encode_start_idx"):  # Qwen-Image's, in words that are known
        if hasattr(pipe, key):
            setattr(pipe, key, getattr(tiny.pipe, key))
    assert all(p.is_meta for p in getattr(pipe, family.network).parameters())
    size = tiny.size.get("height", 8), tiny.size.get("width", 8)
    others = {key: value for key, value in tiny.size.items() if key not in ("height", "width")}
    text = RecordedConditions(pipe, replace(family, always={**family.always, **others}))
    condition, null = family.encode(tiny.pipe, tiny.prompts, **tiny.size)
    same(text(tiny.prompts, size), condition)
    other = text.null_prompt(size)
    assert (other is None) == (null is None)
    if other is not None and not family.ragged:  # of which a null prompt has its own length
        assert null is not None
        same(other, null[:1])
    held = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert not any(p.requires_grad for part in held for p in part.parameters() if not p.is_meta)


def test_a_tokenizer_without_its_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("kolors").pipe.save_pretrained(tmp_path)
    monkeypatch.setattr("diffusers.pipelines.kolors.tokenizer.is_sentencepiece_available", lambda: False)
    teacher = FamilyPipeline(Pipeline(str(tmp_path)))
    with pytest.raises(UserError, match=r"text encoders cannot be loaded \(.*sentencepiece.*pip install"):
        teacher.load_text(torch.float32, torch.device("cpu"))
    scheduler, network = teacher.scheduler, teacher.load_network(torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"cannot be loaded whole \(.*sentencepiece.*pip install"):
        copy_pipeline(teacher, network, scheduler, tmp_path / "out", torch.float32)


def same(one: Condition, other: Condition) -> None:
    assert one.tensors.keys() == other.tensors.keys() and one.static.keys() == other.static.keys()
    for key, value in other.tensors.items():
        torch.testing.assert_close(one.tensors[key], value, rtol=1e-4, atol=1e-5)
