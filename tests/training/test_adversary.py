"""Sana-Sprint's second phase: its gradients, that it learns, and that nothing else is touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NoHostSync
from tiny import metrics, tiny_config, tiny_parts
from torch import Tensor

from tbcm.errors import UserError
from tbcm.training.methods.adversary import Adversary, Shown
from tbcm.training.methods.sprint import Sprint, draw_adversarial
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def make(out: Path, name: str = "sprint", adversary: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    method = {"name": name} | ({"adversary": adversary or {}} if name == "sprint" else {})
    config = tiny_config(out, method=method, **sections)
    trainer = Trainer(config, CPU, tiny_parts(config))
    with torch.no_grad():  # a student that is not its teacher, whose adversarial gradient is then that of nothing else
        for i, parameter in enumerate(trainer.parameters):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += 0.02 * noise
    return trainer


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The student's, of one step, before clipping."""
    found: list[Tensor] = []

    def keep() -> tuple[Tensor, Tensor]:
        found.extend(p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trainer.parameters)
        return torch.ones(()), torch.tensor(True)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.update, "clip", keep)
        trainer.train_step()
    return found


def method_of(trainer: Trainer) -> Sprint:
    assert isinstance(trainer.method, Sprint)
    return trainer.method


def adversary_of(trainer: Trainer) -> Adversary:
    return method_of(trainer).adversary


def by_definition(trainer: Trainer) -> list[Tensor]:
    """The gradient of -mean D(features(noised f(x_t, t))), each formula written out."""
    adversary, sigma = adversary_of(trainer), trainer.config.method.sigma_data
    (batch,) = trainer.source(0)
    x0, condition, w = batch.trajectory.x0, batch.condition, batch.trajectory.guidance
    d = draw_adversarial(0, 0, 4, x0.shape[1:], trainer.config.method, trainer.teacher.t_max, CPU)
    t, s = (angle[:, None, None, None] for angle in (d.t, d.fake_s))
    x_t = t.cos() * x0 + t.sin() * sigma * d.z
    fake = t.cos() * x_t - t.sin() * sigma * trainer.student(x_t / sigma, d.t, condition, w).F
    x_s = s.cos() * fake + s.sin() * sigma * d.fake_noise
    features = trainer.teacher.features(x_s / sigma, d.fake_s, condition, w, adversary.layers)
    loss = -adversary.heads(features, (8, 8)).mean()
    answer = torch.autograd.grad(loss, trainer.parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(answer, trainer.parameters, strict=True)]


def test_the_students_gradient_is_scms_and_the_weighted_adversarial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path / "sprint", adversary={"weight": 0.7})
    adversarial = by_definition(trainer)
    sprint = gradients(trainer, monkeypatch)
    scm = gradients(make(tmp_path / "scm", "scm"), monkeypatch)
    assert max(g.abs().max() for g in adversarial) > 1e-4
    for got, a, b in zip(sprint, scm, adversarial, strict=True):
        torch.testing.assert_close(got, a + 0.7 * b, rtol=1e-3, atol=1e-6)


def test_reals_are_noised_to_times_of_their_own(tmp_path: Path) -> None:
    """Drawn by the same law as the fakes', independently: the discriminator's loss by its definition."""
    trainer = make(tmp_path)
    adversary, sigma = adversary_of(trainer), trainer.config.method.sigma_data
    (batch,) = trainer.source(0)
    x0, condition, w = batch.trajectory.x0, batch.condition, batch.trajectory.guidance
    d = draw_adversarial(0, 0, 4, x0.shape[1:], trainer.config.method, trainer.teacher.t_max, CPU)
    method_of(trainer).adversarial(trainer.wrapped, batch, 0, 0)
    learnt = adversary.learn(last=True)
    s = d.real_s[:, None, None, None]
    x_s = s.cos() * x0 + s.sin() * sigma * d.real_noise
    with torch.no_grad():
        real = adversary.heads(trainer.teacher.features(x_s / sigma, d.real_s, condition, w, adversary.layers), (8, 8))
    torch.testing.assert_close(learnt["real_score"], real.mean(), rtol=1e-4, atol=1e-6)
    many = draw_adversarial(0, 0, 20_000, (1,), trainer.config.method, trainer.teacher.t_max, CPU)
    a, b = (torch.log(sigma * torch.tan(times.double())) for times in (many.fake_s, many.real_s))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.03  # standard error 0.007
    for times in (a, b):
        assert times.mean().item() == pytest.approx(-0.6, abs=0.03) and times.std().item() == pytest.approx(1, abs=0.03)


def test_the_students_loss_changes_neither_heads_nor_teacher(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    adversary = adversary_of(trainer)
    (batch,) = trainer.source(0)
    method_of(trainer).adversarial(trainer.wrapped, batch, 0, 0).value.backward()
    assert all(p.grad is None for p in (*adversary.heads.parameters(), *trainer.teacher.parameters()))
    adversary.learn(last=True)
    learning = {name: p.grad for name, p in adversary.heads.named_parameters()}
    assert all(gradient is not None for gradient in learning.values())
    # (That of the last bias is zero where no score is beyond its margin.)
    assert all(gradient.abs().max() > 0 for name, gradient in learning.items() if not name.endswith("score.bias"))
    assert all(p.grad is None for p in trainer.teacher.parameters())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_batches_and_recomputation_change_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    whole = make(tmp_path / "whole")
    parts = make(tmp_path / "parts", train={"prompts_per_rollout": 1}, student={"checkpointing": checkpointing})
    for a, b in zip(gradients(whole, monkeypatch), gradients(parts, monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    pairs = zip(adversary_of(whole).heads.parameters(), adversary_of(parts).heads.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_the_discriminator_learns_to_tell_a_student_that_does_not_move(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        adversary={"lr": 1e-2},
        optimizer={"lr": 1e-12},
        train={"steps": 30, "prompts_per_step": 9},
        log={"every": 10, "preview_every": 0},
    )
    trainer.run()
    rows = metrics(tmp_path)
    assert rows[-1]["discriminator_loss"] < 0.6 * rows[0]["discriminator_loss"]
    assert rows[-1]["real_score"] - rows[-1]["fake_score"] > 1


def heads_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in adversary_of(trainer).heads.parameters()]


def test_an_update_that_the_student_skips_is_skipped_by_the_discriminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer.update, "clip", lambda: (torch.zeros(()), torch.tensor(False)))
    before = heads_of(trainer)
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, heads_of(trainer), strict=True))


def test_a_discriminator_whose_gradient_is_not_finite_counts_as_a_skipped_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    adversary = adversary_of(trainer)
    plain = adversary._features

    def features(shown: Shown, *rest: Any) -> list[Tensor]:
        found = plain(shown, *rest)
        return found if torch.is_grad_enabled() else [x * float("nan") for x in found]

    monkeypatch.setattr(adversary, "_features", features)
    before = heads_of(trainer)
    trainer.train_step()
    assert trainer.guard.total == 1
    assert all(torch.equal(a, b) for a, b in zip(before, heads_of(trainer), strict=True))


@pytest.mark.parametrize("at_once", [None, 1])
def test_singular_values_are_followed_once_a_step_whatever_the_batches(tmp_path: Path, at_once: int | None) -> None:
    trainer = make(tmp_path, train={"prompts_per_micro_batch": at_once})
    (expected := copy.deepcopy(adversary_of(trainer).heads)).renew()
    wanted = dict(expected.named_buffers())
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    adversary_of(trainer).optimizer.param_groups[0]["lr"] = 0.0
    trainer.train_step()
    buffers = dict(adversary_of(trainer).heads.named_buffers())
    assert buffers and all(torch.equal(buffers[name], wanted[name]) for name in buffers)


def test_a_step_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make(tmp_path, train={"prompts_per_rollout": 2})
    asked = iter([False, False, True])
    assert not trainer.train_step(lambda: next(asked))
    adversary = adversary_of(trainer)
    assert adversary._shown is None and all(p.grad is None for p in adversary.heads.parameters())
    assert not trainer.statistics.summary()["loss"].isfinite(), "of no step"


def test_a_run_that_goes_on_without_its_adversary_logs(tmp_path: Path) -> None:
    make(tmp_path, train={"steps": 1}, log={"every": 4}).run()
    trainer = make(tmp_path, "scm", train={"steps": 2})
    trainer.resume()
    trainer.run()
    assert "adversarial" not in metrics(tmp_path)[-1]


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train_step()
    with NoHostSync():
        trainer.train_step()


def test_a_layer_that_the_teacher_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers = \[0, 9\].*0 to 1"):
        make(tmp_path, adversary={"layers": [0, 9]})
