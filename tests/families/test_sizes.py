"""Every family for images of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.test_training import written
from families.tiny import make

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.errors import UserError
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.pipeline import Pipeline
from tbcm.samples.rollouts import draw_size
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
SIZES: tuple[Size, ...] = ((16, 16), (16, 32), (32, 16))
TOLD = "time_ids", "resolution", "aspect_ratio"


def sized(name: str, folder: Path, steps: int = 6) -> Config:
    return written(name, folder, steps=steps, seed=1).model_copy(update={"resolution": SIZES})


@pytest.mark.parametrize("name", ["sdxl", "flux", "cogview4"])
def test_a_run_over_three_sizes_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Whose conditions, static arguments, or times depend on the size."""
    config = sized(name, tmp_path)
    assert {draw_size(SIZES, 1, step) for step in range(6)} == set(SIZES)
    runs = []
    for stop in (6, 3):
        trainer = Trainer(config, CPU, build_parts(config, CPU))
        if stop < 6:
            (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "later")
            trainer.resume()
            assert trainer.step == 4
        trainer.run()
        runs.append({key: value.clone() for key, value in trainer.student.state_dict().items()})
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize("name", ["sdxl", "kolors", "pixart_alpha"])
def test_what_the_network_is_told_of_the_size_is_the_steps(name: str, tmp_path: Path) -> None:
    config = sized(name, tmp_path)
    source = Trainer(config, CPU, build_parts(config, CPU)).source
    for step in range(6):
        height, width = draw_size(SIZES, 1, step)
        batch = next(iter(source(step)))
        found = batch.condition.tensors
        told = {key: found[f"added_cond_kwargs.{key}"].tolist() for key in TOLD if f"added_cond_kwargs.{key}" in found}
        if name == "pixart_alpha":
            assert told == {"resolution": [[height, width]] * 2, "aspect_ratio": [[height / width]] * 2}
        else:  # original size, crop, target size
            assert told == {"time_ids": [[height, width, 0, 0, height, width]] * 2}
        assert batch.trajectory.x.shape[-2:] == (height // 2, width // 2)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("sd3", (16, 17), "16x17: sides should be multiples of 2"),
        ("flux", (16, 18), "16x18: sides should be multiples of 4"),
        ("pixart", (18, 16), "18x16: sides should be multiples of 4"),
        ("sd3", (16, 400), "positions for sides of up to 192"),
        ("auraflow", (64, 16), "positions for sides of up to 32"),
        ("dit", (16, 24), "DiTPipeline makes images of one size only: set resolution=16"),
        ("ddpm", (16, 16), "DDPMPipeline makes images of one size only: set resolution=8"),
    ],
)
def test_sizes_that_a_network_cannot_make(name: str, size: Size, words: str, tmp_path: Path) -> None:
    make(name).pipe.save_pretrained(tmp_path)
    pipeline = FamilyPipeline(Pipeline(str(tmp_path)))
    with pytest.raises(UserError, match=words):
        pipeline.check_size(size)


def test_what_the_pipeline_itself_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    """CogView4's asks for multiples of 16, also where its autoencoder and network would do with less."""
    config = written("cogview4", tmp_path).model_copy(update={"resolution": ((16, 24),)})
    with pytest.raises(UserError, match=r"CogView4Pipeline refuses this for resolution = 16x24: .* divisible by 16"):
        Trainer(config, CPU, build_parts(config, CPU))


@pytest.mark.usefixtures("fresh_compiler")
def test_nothing_is_compiled_after_each_size_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> torch.fx.GraphModule:
        graphs.append(None)
        return graph

    def compiled(fn: Any, **options: Any) -> Any:
        return compile_(fn, **options | {"backend": backend, "options": None})

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    config = sized("sd3", tmp_path)
    update = {"teacher": {"compile": True}, "student": {"compile": True}}
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in update.items()}
    )
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    seen: dict[Size, int] = {}
    for step in range(7):
        before, size = len(graphs), draw_size(SIZES, 1, step)
        trainer.train_step()
        assert (len(graphs) > before) == (size not in seen), (step, size)
        seen[size] = len(graphs) - before
    assert seen.keys() == set(SIZES)
