"""What a dry run says that a rank holds is what it holds."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import tiny_config, tiny_parts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tbcm.runtime import distributed
from tbcm.runtime.distributed import local
from tbcm.runtime.files import write_json
from tbcm.training.accounting import CostCounter
from tbcm.training.dryrun import report
from tbcm.training.holdings import gathered, holdings, on_a_rank
from tbcm.training.methods.sprint import Sprint
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer


def size(tensors: Any) -> int:
    return sum(local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor))


def trainer_of(out: Path, mode: str = "ddp") -> Trainer:
    config = tiny_config(out, parallel={"mode": mode})
    return Trainer(config, torch.device("cpu"), tiny_parts(config))


def hold(out: Path) -> None:
    trainer = trainer_of(out, "fsdp")
    found = {
        "teacher": size([*trainer.teacher.parameters(), *trainer.teacher.buffers()]),
        "student": size([*trainer.student.parameters(), *trainer.student.buffers()]),
        "optimizer": size(value for of_one in trainer.optimizer.state.values() for value in of_one.values()),
        "average": size(trainer.ema.shadow.values()),
    }
    if distributed.is_main():
        write_json(out / "held.json", found)


def test_a_rank_of_two_holds_its_share(tmp_path: Path) -> None:
    on_ranks(2, hold, tmp_path)
    found = json.loads((tmp_path / "held.json").read_text())
    told = on_a_rank(holdings(trainer_of(tmp_path)), 2, accumulates=False)
    # Rank 0 has the larger half of an odd number of rows.
    assert {kind: told[kind] for kind in found} == pytest.approx(found, rel=0.05)


def test_bytes_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    numbers = sum(p.numel() for p in trainer.student.parameters())
    whole = holdings(trainer)
    assert (whole["gradients"], whole["average"]) == (4 * numbers, 4 * numbers)
    assert whole["optimizer"] == 8 * numbers + 4 * len(trainer.parameters)  # and the count of steps
    assert whole["text encoder"] == whole["VAE"] == 0
    share = on_a_rank(whole, 3, accumulates=True)
    assert share == whole | {name: -(-whole[name] // 3) for name in ("student", "optimizer", "average")}
    # Of two blocks both are gathered: then it is the whole student.
    assert gathered(trainer.student, trainer.blocks) == 4 * numbers


def test_a_backbone_that_teacher_and_student_share_counts_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, student={"lora": {"rank": 2}})
    trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
    trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    whole = holdings(trainer)
    assert {whole[name] for name in ("student", "gradients", "average")} == {4 * trained}
    everything = [p for net in (trainer.teacher, trainer.student) for p in (*net.parameters(), *net.buffers())]
    distinct = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in everything}
    assert whole["teacher"] + whole["student"] == sum(distinct.values())
    assert gathered(trainer.student, trainer.blocks) == 4 * trained


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_dry_run_accounts_for_what_is_held(tmp_path: Path, lora: dict[str, int] | None) -> None:
    """Live tensors, before a step has made gradients: a backbone that is shared is there once."""
    sections = {"teacher": {"architecture": "tiny"}, "text": {"cache": "unused"}, "student": {"lora": lora}}
    config, device = tiny_config(tmp_path, **sections), torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), CostCounter() as counter:
        trainer = Trainer(config, device, random_parts(config, device))
        gc.collect()
        held = holdings(trainer)
        assert counter.live == pytest.approx(sum(held.values()) - held["gradients"], abs=20_000)
    assert (held["student"] < held["teacher"] / 2) == (lora is not None)
    assert ("(LoRA of rank 2)" in report(trainer, 1, 1, 0)["student"]) == (lora is not None)


@pytest.mark.parametrize("method", ["lcm", "pcm", "dmd2"])
def test_what_a_method_holds_beside_is_told(tmp_path: Path, method: str) -> None:
    """Live tensors, as above; and a step of it can be accounted."""
    settings = {"name": method} | ({} if method == "lcm" else {"adversary": {}})
    sections = {"teacher": {"architecture": "tiny"}, "data": {"latents": "unused", "images": None}, "method": settings}
    if method != "dmd2":
        sections["data"], sections["text"] = {}, {"cache": "unused"}
    config, device = tiny_config(tmp_path, **sections), torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), CostCounter() as counter:
        trainer = Trainer(config, device, random_parts(config, device))
        gc.collect()
        held = holdings(trainer)
        gradients = sum(size for name, size in held.items() if name.endswith("gradients"))
        assert counter.live == pytest.approx(sum(held.values()) - gradients, abs=20_000)
        before = counter.flops
        trainer.train_step()
    assert counter.flops > before and held.get("target" if method == "lcm" else "discriminator", 0) > 0


def test_a_discriminator_is_told_with_what_belongs_to_its_weights(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method={"name": "sprint"})
    trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
    assert isinstance(trainer.method, Sprint)
    heads = trainer.method.adversary.heads
    weights, gradients = size([*heads.parameters(), *heads.buffers()]), size(heads.parameters())
    state = trainer.method.adversary.optimizer.state.values()
    held = holdings(trainer)
    assert (held["discriminator"], held["discriminator's gradients"]) == (weights, gradients)
    assert held["discriminator's optimizer"] == size(v for one in state for v in one.values())
