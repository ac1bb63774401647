"""Families beside Sana, over images of several sizes: two ranks, replicated or sharded, make the run that one makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families.test_training import written
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbcm.config import load_config
from tbcm.runtime import distributed
from tbcm.samples.rollouts import draw_size
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

NAMES = ("flux", "sd3", "sdxl")
SIZES = ((16, 16), (16, 24), (24, 16))


def train(home: Path, modes: tuple[str, ...]) -> None:
    """Each family's student and average after three steps, one of each size."""
    for name in NAMES:
        for mode in modes:
            config = load_config(home / name / "c.yaml", [f"parallel.mode={mode}", f"out={home / name / 'run'}"])
            config = config.model_copy(update={"resolution": SIZES})
            trainer = Trainer(config, torch.device("cpu"), build_parts(config, torch.device("cpu")))
            for _ in range(3):
                trainer.train_step()
            assert all(isinstance(weight, DTensor) == (mode == "fsdp") for weight in trainer.student.parameters())
            found = whole(trainer.student.state_dict()), whole(trainer.ema.shadow)
            if distributed.is_main():
                torch.save(found, home / name / f"{mode}-{distributed.world_size()}.pt")


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, and what one rank makes of them; then what two do."""
    folder = tmp_path_factory.mktemp("families")
    assert {draw_size(SIZES, 3, step) for step in range(3)} == set(SIZES)
    for name in NAMES:
        (folder / name).mkdir()
        written(name, folder / name, seed=3)
        text = (folder / name / "c.yaml").read_text()
        # A small rate of AdamW, which divides by the gradient's size: rounding must not grow.
        (folder / name / "c.yaml").write_text(text.replace("lr: 0.001", "lr: 0.0001"))
    train(folder, ("ddp",))
    on_ranks(2, train, folder, ("ddp", "fsdp"))
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_ranks_changes_nothing(name: str, mode: str, home: Path) -> None:
    one, two = torch.load(home / name / "ddp-1.pt"), torch.load(home / name / f"{mode}-2.pt")
    for expected, got in zip(one, two, strict=True):
        assert expected.keys() == got.keys()
        for key in expected:
            # Of a gradient near zero AdamW makes a tenth of a step out of rounding; a wrong one is a whole step, 1e-4.
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
