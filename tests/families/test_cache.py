"""Conditions that were computed once, in place of a family's text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families.test_sizes import SIZES
from families.test_training import written

from tbcm.config import Config
from tbcm.encode import encode_prompts
from tbcm.errors import UserError
from tbcm.models.families.family import LENGTH
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.setup.parts import build_parts
from tbcm.setup.text import build_cached_text, build_prompts, build_text
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def encoded(name: str, folder: Path, sizes: object = SIZES) -> tuple[Config, Config]:
    """A run's configuration, without and with a cache."""
    config = written(name, folder, seed=3).model_copy(update={"resolution": sizes})
    encode_prompts(config, str(folder / "cache"), CPU, dtype="float32", batch=2)
    text = config.text.model_copy(update={"cache": str(folder / "cache")})
    return config, config.model_copy(update={"text": text})


@pytest.mark.parametrize("name", ["sd3", "sdxl", "pixart_alpha", "kolors"])
def test_training_from_the_cache_is_training_with_the_encoders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cached = encoded(name, tmp_path)
    found = []
    for each in (config, cached):
        if each is cached:
            monkeypatch.setattr(FamilyPipeline, "load_text", None)  # no encoder is loaded
        trainer = Trainer(each, CPU, build_parts(each, CPU))
        for _ in range(3):  # a step of each size
            trainer.train_step()
        found.append({key: value.clone() for key, value in trainer.student.state_dict().items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", ["flux", "chroma", "cogview4", "zimage"])
def test_static_sized_and_ragged_conditions_are_those_of_the_encoders(name: str, tmp_path: Path) -> None:
    sizes = ((32, 32), (32, 64)) if name == "zimage" else SIZES
    config, cached = encoded(name, tmp_path, sizes)
    text, ours = build_text(config, CPU), build_cached_text(cached, build_prompts(cached), CPU)
    prompts = [*build_prompts(config)]
    assert prompts[0] in ours and "something else" not in ours  # type: ignore[operator]
    for size in sizes:
        for one, other in (
            (text(prompts, size), ours(prompts, size)),
            (text.null_prompt(size), ours.null_prompt(size)),
        ):
            assert (one is None) == (other is None)
            if one is None or other is None:
                continue
            assert one.tensors.keys() == other.tensors.keys() and one.static.keys() == other.static.keys()
            for key, value in [*one.tensors.items(), *one.static.items()]:
                theirs = {**other.tensors, **other.static}[key]
                if (lengths := one.tensors.get(key + LENGTH)) is not None:  # what pads it says nothing
                    rows = zip(value, theirs, lengths.tolist(), strict=True)
                    assert all(torch.equal(a[:n], b[:n]) for a, b, n in rows), key
                else:
                    assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, key


def test_a_cache_of_other_sizes_prompts_or_encoders_is_refused(tmp_path: Path) -> None:
    _, cached = encoded("sd3", tmp_path)
    other = cached.model_copy(update={"resolution": SIZES[:1]})
    with pytest.raises(UserError, match=r"text\.cache=.* does not match .*: resolution"):
        build_parts(other, CPU)
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(UserError, match=r"does not match .*: data\.prompts"):
        build_parts(cached, CPU)
    (tmp_path / "prompts.txt").write_text("a red panda\nblue cat")
    file = tmp_path / "teacher" / "text_encoder" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=r"does not match .*: teacher\.path"):
        build_parts(cached, CPU)
