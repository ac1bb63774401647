"""LCM in the trainer: its samples, its target network, and that nothing of it is lost or left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from end_state import differences
from helpers import NoHostSync
from tiny import gradients, metrics, tiny_config, tiny_parts
from torch import Tensor

from tbcm.errors import UserError
from tbcm.training.holdings import holdings
from tbcm.training.methods.lcm import Lcm
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def make(out: Path, method: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    config = tiny_config(out, method={"name": "lcm"} | (method or {}), **sections)
    return Trainer(config, CPU, tiny_parts(config))


def method_of(trainer: Trainer) -> Lcm:
    assert isinstance(trainer.method, Lcm)
    return trainer.method


def target_of(trainer: Trainer) -> dict[str, Tensor]:
    target = method_of(trainer).target
    assert target is not None
    return dict(target.net.named_parameters())


@pytest.mark.parametrize("method", [{}, {"target_decay": 0}, {"samples": "images"}], ids=["target", "itself", "images"])
def test_a_step_reaches_every_weight_and_reads_nothing_from_the_device(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, method)
    found = gradients(trainer, monkeypatch)  # no head is there that would have none
    assert len(found) == len(trainer.parameters) and "logvar_head.weight" not in dict(
        trainer.student.named_parameters()
    )
    with NoHostSync():
        trainer.train_step()


def test_all_points_of_a_trajectory_train(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert (trainer.source.first_point, trainer.method.samples_per_step) == (0, 4 * 4)
    assert make(tmp_path / "images", {"samples": "images"}).method.samples_per_step == 4


def test_micro_batches_and_accumulation_give_the_gradient_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(make(tmp_path), monkeypatch)
    for train in ({"prompts_per_rollout": 1}, {"points_per_micro_batch": 3}):
        parts = gradients(make(tmp_path, train=train), monkeypatch)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in whole) > 1e-3


def test_the_target_is_the_average_of_the_students_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"target_decay": 0.75})
    wanted = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    for name, weight in target_of(trainer).items():
        assert torch.equal(weight, wanted[name]) and not weight.requires_grad
    for _ in range(3):
        trainer.train_step()
        for name, weight in trainer.student.named_parameters():
            wanted[name] = 0.75 * wanted[name] + 0.25 * weight.detach()
    for name, weight in target_of(trainer).items():
        torch.testing.assert_close(weight.detach(), wanted[name], rtol=1e-5, atol=1e-7)


def test_an_update_that_is_skipped_leaves_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)
    trainer.train_step()
    before = {name: weight.clone() for name, weight in target_of(trainer).items()}
    monkeypatch.setattr(trainer.update, "clip", lambda: (torch.zeros(()), torch.tensor(False)))
    trainer.train_step()
    assert all(torch.equal(weight, before[name]) for name, weight in target_of(trainer).items())


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}}], ids=["whole", "lora"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, student: dict[str, Any]) -> None:
    make(tmp_path / "whole", student=student).run()
    make(tmp_path / "half", student=student, train={"steps": 3}).run()
    rest = make(tmp_path / "half", student=student)
    rest.resume()
    rest.run()
    found = [line for line in differences(tmp_path / "half", tmp_path / "whole") if "metrics.jsonl" not in line]
    assert found == []


def test_with_adapters_the_target_shares_the_teachers_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path, student={"lora": {"rank": 2}})
    shared = {id(p) for p in trainer.teacher.parameters()}
    own = [p for p in target_of(trainer).values() if id(p) not in shared]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in trainer.parameters)
    assert holdings(trainer)["target"] == sum(4 * p.numel() for p in own)


def test_what_a_rank_holds_has_the_target_in_it(tmp_path: Path) -> None:
    whole = holdings(make(tmp_path))
    assert whole["target"] == whole["average"] > 0
    assert "target" not in holdings(make(tmp_path, {"target_decay": 0}))


def test_a_student_learns_the_teachers_ode(tmp_path: Path) -> None:
    """On one trajectory for one prompt: what the student says of it becomes one answer, from data backwards."""

    def spread(trainer: Trainer) -> float:
        """How far apart the answers from a trajectory's points are."""
        (batch,) = trainer.source(0)
        way, sigma = batch.trajectory, trainer.config.method.sigma_data
        t = way.t.flatten()
        with torch.no_grad():
            F = trainer.student(way.x.flatten(0, 1) / sigma, t, batch.condition, way.guidance.repeat_interleave(4)).F
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        x0 = cos * way.x.flatten(0, 1) - sin * sigma * F
        return x0.unflatten(0, way.t.shape).std(1).mean().item()

    train = {"steps": 30, "prompts_per_step": 2}
    solver = {"skip": 100, "shift": 1.0}
    trainer = make(
        tmp_path,
        {"solver": solver, "target_decay": 0, "brightness_threshold": 0.0},
        train=train,
        optimizer={"lr": 3e-3},
        log={"every": 10, "preview_every": 0},
    )
    before = spread(trainer)
    trainer.run()
    assert spread(trainer) < 0.6 * before
    rows = metrics(tmp_path)
    assert rows[-1]["error"] < rows[0]["error"] and {"r", "g_norm", "logvar", "logvar_by_t/0"}.isdisjoint(rows[0])


@pytest.mark.parametrize("decay", [0.95, 0.0])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_steps_move_student_and_target(tmp_path: Path, precision: str, decay: float) -> None:
    """Also where the student itself, asked without a graph, is the target: weights are cast for both."""
    config = tiny_config(tmp_path, method={"name": "lcm", "target_decay": decay}, student={"precision": precision})
    wide = {"attention_head_dim": 32, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    trainer = Trainer(config, CPU, tiny_parts(config, **wide))
    if precision == "fp16":  # else many steps are skipped until the scale has come down
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 256.0})
    name = "backbone.proj_out.weight"
    weight = target_of(trainer)[name] if decay else dict(trainer.student.named_parameters())[name]
    before = weight.detach().clone()
    for _ in range(3):
        trainer.train_step()
    after = weight.detach()
    assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"solver": {"skip": 2000}}}, "method.solver.skip = 2000: at most method.solver.timesteps = 1000"),
        ({"method": {"target_decay": 1.0}}, "method.target_decay = 1.0: should be less than 1"),
        ({"method": {"samples": "noise"}}, "'trajectories' or 'images'"),
        ({"method": {"r": {"final": 1.0}}}, r"unknown key 'method.r'.*\(method.name=lcm\)"),
        ({"parallel": {"mode": "fsdp"}}, r"parallel.mode=fsdp needs method.target_decay=0 \(now 0.95\)"),
        ({"method": {"samples": "images"}, "data": {"images": None}}, "method.samples=images needs data.images"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make(tmp_path, change.get("method"), **{key: value for key, value in change.items() if key != "method"})
    assert "\n" not in str(caught.value)


def test_a_run_of_tbcm_does_not_go_on_as_lcm(tmp_path: Path) -> None:
    """Its student has a log-variance head."""
    config = tiny_config(tmp_path, train={"steps": 1})
    Trainer(config, CPU, tiny_parts(config)).run()
    with pytest.raises(UserError, match="does not fit this model"):
        make(tmp_path).resume()
