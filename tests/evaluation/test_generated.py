"""Generation that goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_sana
from tiny import PROMPTS, HashEncoder, tiny_config, write_teacher
from torch import Tensor

import tbcm
from tbcm.evaluation.generated import Generated, read
from tbcm.inference.generation import Sampler
from tbcm.models.loading import freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.samples.rollouts import TextConditions

SIZE = (64, 64)


def generated(home: Path, folder: Path, *, batch: int = 2, seed: int = 3, precision: str = "fp32") -> Generated:
    net = SanaTrigFlow(tiny_sana(guidance_embeds=True), timestep_scale=1.0, differentiable=False)
    freeze(net)
    config, pipeline = tiny_config(home, student={"precision": precision}), Pipeline(str(home / "teacher"))
    text = TextConditions(HashEncoder(), "own")
    sampler = Sampler(net, text, config, pipeline, teacher=False, batch=batch)
    return Generated(sampler, {"weights": "tiny"}, PROMPTS, steps=2, guidance=2.5, seed=seed, folder=folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> Tensor:
    return read(generated(home, home / "whole").images(), SIZE)


def test_images_are_the_samplers(home: Path, whole: Tensor) -> None:
    """In batches of two, two at a time, as one call for all prompts makes them."""
    sampler = generated(home, home).sampler
    one = sampler(PROMPTS, steps=2, guidance=2.5, seed=3)
    assert int((one.int() - whole.int()).abs().max()) <= 1  # other batches may round otherwise
    assert len({image.numpy().tobytes() for image in whole}) == len(PROMPTS)


def test_an_interrupted_generation_ends_with_the_same_images(
    home: Path, whole: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generated(home, tmp_path)
    sample, calls = Sampler.__call__, []

    def stop_at_the_third(self: Sampler, prompts: list[str], **options: int) -> Tensor:
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, **options)

    monkeypatch.setattr(Sampler, "__call__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        made.images()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    assert len(kept) == 4
    files = made.images()
    assert torch.equal(read(files, SIZE), whole)
    assert len(calls) == 3 + 3  # nine prompts are five batches, of which two were kept
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_other_settings_have_another_folder(home: Path, whole: Tensor, tmp_path: Path) -> None:
    first, other = generated(home, tmp_path).images(), generated(home, tmp_path, seed=4).images()
    assert first[0].parent != other[0].parent
    assert not torch.equal(read(other, SIZE), read(first, SIZE))


def test_another_version_or_precision_is_made_anew(
    home: Path, whole: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, half = generated(home, tmp_path).images(), generated(home, tmp_path, precision="bf16").images()
    assert not torch.equal(read(half, SIZE), read(first, SIZE))
    monkeypatch.setattr(tbcm, "__version__", "another")
    again = generated(home, tmp_path).images()
    assert len({files[0].parent for files in (first, half, again)}) == 3


def test_latents_do_not_depend_on_the_batch_and_are_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = generated(home, tmp_path / "two"), generated(home, tmp_path / "three", batch=3)
    latents = two.latents()
    torch.testing.assert_close(three.latents(), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents, two.sampler.latents(PROMPTS, steps=2, guidance=2.5, seed=3))
    monkeypatch.setattr(Sampler, "latents", None)
    assert torch.equal(generated(home, tmp_path / "two").latents(), latents)
