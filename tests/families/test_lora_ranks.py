"""Adapters on another family's backbone: two ranks, replicated or sharded, make the run that one rank makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families.test_training import CPU, written
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbcm.config import Config
from tbcm.runtime import distributed
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer


def train(config: Config, out: Path) -> None:
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    sharded = config.parallel.mode == "fsdp" and distributed.world_size() > 1
    assert {isinstance(p, DTensor) for p in trainer.parameters} == {sharded}
    assert not any(isinstance(p, DTensor) for p in trainer.teacher.parameters())
    for _ in range(2):
        trainer.train_step()
    weights = {name: whole(p) for name, p in trainer.student.named_parameters() if p.requires_grad}
    average = {name: whole(value) for name, value in trainer.ema.shadow.items()}
    if distributed.is_main():
        torch.save((weights, average), out)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def test_the_number_of_ranks_changes_nothing(tmp_path: Path) -> None:
    config = written("sd3", tmp_path, {"lora": {"rank": 2}}, prompts_per_step=4)
    ways = {mode: changed(config, mode) for mode in ("ddp", "fsdp")}
    train(config, tmp_path / "single.pt")
    for mode, way in ways.items():
        on_ranks(2, train, way, tmp_path / f"{mode}.pt")
        for expected, got in zip(torch.load(tmp_path / "single.pt"), torch.load(tmp_path / f"{mode}.pt"), strict=True):
            assert expected.keys() == got.keys()
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5, msg=f"{mode} {name}")


def changed(config: Config, mode: str) -> Config:
    tree: dict[str, Any] = config.model_dump(mode="json") | {"parallel": {"mode": mode}}
    return Config.model_validate(tree)
