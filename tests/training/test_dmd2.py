"""DMD2 in the trainer: both networks' gradients, their updates, and that nothing of them is lost or left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from end_state import differences
from helpers import NoHostSync
from tiny import PROMPTS, TinyLatents, gradients, metrics, tiny_config, tiny_parts
from torch import Tensor

from tbcm.errors import UserError
from tbcm.method.sampling import student_times
from tbcm.runtime.seeding import generator
from tbcm.training.holdings import holdings, on_a_rank
from tbcm.training.methods.dmd2 import Dmd2
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
SIGMA = 0.5


def make(out: Path, method: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    config = tiny_config(out, method={"name": "dmd2"} | (method or {}), **sections)
    trainer = Trainer(config, CPU, tiny_parts(config))
    with torch.no_grad():  # a student that is not its teacher, and a second network that is neither
        for i, parameter in enumerate((*trainer.parameters, *method_of(trainer).fake.parameters)):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return trainer


def method_of(trainer: Trainer) -> Dmd2:
    assert isinstance(trainer.method, Dmd2)
    return trainer.method


def drawn(name: str, *shape: int, uniform: bool = False) -> Tensor:
    source = generator(CPU, 0, 0, name)
    return torch.rand(shape, generator=source) if uniform else torch.randn(shape, generator=source)


def over(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def noised_times(name: str, low: float, high: float) -> Tensor:
    q = low + (high - low) * (1 - drawn(f"{name} time", 4, uniform=True))
    s = 3 * q / (1 + 2 * q)
    return torch.atan2(s, 1 - s)


def guided(trainer: Trainer, u: Tensor, s: Tensor, condition: Any, w: Tensor) -> Tensor:
    """The teacher's two branches, combined."""
    null = trainer.text.null_prompt((64, 64)).expand(len(u))
    with torch.no_grad():
        with_text, without = (trainer.teacher(u, s, c).F for c in (condition, null))
    return without + over(w) * (with_text - without)


def by_definition(trainer: Trainer) -> list[Tensor]:
    """The gradient of one-step samples along (x^_fake - x^_real) / mean |x - x^_real|, each formula written out."""
    method = method_of(trainer)
    (batch,) = trainer.source(0)
    z, w = batch.trajectory.x[:, 0], batch.trajectory.guidance
    torch.testing.assert_close(z, SIGMA * drawn("noise", 4, 4, 8, 8))
    x = -SIGMA * trainer.student(z / SIGMA, torch.full((4,), torch.pi / 2), batch.condition, w).F
    s = noised_times("matched", 0.02, 0.98)
    x_s = over(s.cos()) * x + over(s.sin()) * SIGMA * drawn("matched noise", 4, 4, 8, 8)
    x_s = x_s.detach()
    with torch.no_grad():
        F = method.fake.net(x_s / SIGMA, s, batch.condition, w).F, guided(trainer, x_s / SIGMA, s, batch.condition, w)
    fake, real = (over(s.cos()) * x_s - over(s.sin()) * SIGMA * each for each in F)
    g = (fake - real) / (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    return list(torch.autograd.grad(x, trainer.parameters, g / SIGMA / x.numel()))


def test_the_students_gradient_is_by_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)
    wanted = by_definition(trainer)
    got = gradients(trainer, monkeypatch)
    assert max(g.abs().max() for g in wanted) > 1e-3
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_fake_networks_gradient_is_that_of_flow_matching_on_the_students_new_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, {"fake": {"updates": 1}}, optimizer={"lr": 1e-12})
    fake, (batch,) = method_of(trainer).fake, trainer.source(0)
    w = batch.trajectory.guidance
    z = SIGMA * drawn("start of update 0", 4, 4, 8, 8)
    with torch.no_grad():
        x = -SIGMA * trainer.student(z / SIGMA, torch.full((4,), torch.pi / 2), batch.condition, w).F
    s, z = noised_times("followed of update 0", 0, 1), SIGMA * drawn("followed of update 0 noise", 4, 4, 8, 8)
    x_s, velocity = over(s.cos()) * x + over(s.sin()) * z, (over(s.cos()) * z - over(s.sin()) * x) / SIGMA
    loss = (fake.net(x_s / SIGMA, s, batch.condition, w).F - velocity).square().mean()
    wanted, found = torch.autograd.grad(loss, fake.parameters), []
    zero_grad = fake.optimizer.zero_grad

    def keep(set_to_none: bool = True) -> None:
        found.extend(p.grad.clone() for p in fake.parameters if p.grad is not None)
        zero_grad(set_to_none)

    monkeypatch.setattr(fake.optimizer, "zero_grad", keep)
    monkeypatch.setattr("tbcm.training.methods.fake.clip_and_check", lambda *_: (None, torch.tensor(True)))
    trainer.train_step()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert trainer.statistics.summary()["fake_loss"].item() == pytest.approx(loss.item(), rel=1e-4)


def test_it_makes_so_many_updates_for_one_of_the_student(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"fake": {"updates": 3}}, train={"prompts_per_rollout": 1})
    for _ in range(2):
        trainer.train_step()
    steps = {int(state["step"]) for state in method_of(trainer).fake.optimizer.state.values()}
    assert steps == {6} and {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}


def test_it_starts_as_the_conditional_teacher(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method={"name": "dmd2"})
    trainer = Trainer(config, CPU, tiny_parts(config))
    (batch,) = trainer.source(0)
    u, t = batch.trajectory.x[:, 0] / SIGMA, torch.full((4,), 0.7)
    with torch.no_grad():
        teachers = trainer.teacher(u, t, batch.condition).F
    torch.testing.assert_close(
        method_of(trainer).fake.velocity(u, t, batch.condition, batch.trajectory.guidance), teachers
    )


def test_nothing_of_the_teacher_is_rolled_out(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    (batch,) = trainer.source(0)
    assert batch.trajectory.x.shape[1] == 1 and trainer.method.samples_per_step == 4
    assert (batch.trajectory.t == torch.pi / 2).all() and (batch.trajectory.x0 == 0).all()


def test_batches_change_no_gradient_of_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same: dict[str, Any] = {"steps": 2, "adversary": {"lr": 1e-3}}
    whole = make(tmp_path / "whole", same)
    first = gradients(whole, monkeypatch)
    parts = make(tmp_path / "parts", same, train={"prompts_per_micro_batch": 3})
    for a, b in zip(first, gradients(parts, monkeypatch), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)
    for name in ("fake", "discriminator"):
        nets = (each.method.beside[name].net.parameters() for each in (whole, parts))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*nets, strict=True))


def test_a_student_of_several_steps_is_trained_at_each_of_its_times(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"steps": 4, "fake": {"updates": 1}})
    asked: list[tuple[float, bool]] = []
    trainer.student.register_forward_pre_hook(
        lambda _, given: asked.append((given[1][0].item(), torch.is_grad_enabled()))
    )
    for _ in range(12):
        trainer.train_step()
    times = student_times(4, torch.pi / 2)
    trained = {round(t, 4) for t, grad in asked if grad}
    assert trained == {round(t, 4) for t in times} and len([t for t, grad in asked if grad]) == 12
    before = [t for t, grad in asked if not grad]
    assert {round(t, 4) for t in before} == trained  # the fake network learns of all of them too


def test_the_adversarial_term_compares_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = make(tmp_path / "with", {"adversary": {"weight": 0.7}})
    (batch,) = with_it.source(0)
    x0, _ = TinyLatents().latents([0], (64, 64))
    assert len(x0) == 1 and (batch.trajectory.x0 != 0).any() and len(PROMPTS) == 9
    got = gradients(with_it, monkeypatch)
    without = make(tmp_path / "without", {"adversary": {"weight": 1e-9}})
    alone = gradients(without, monkeypatch)
    twice = gradients(make(tmp_path / "twice", {"adversary": {"weight": 1.4}}), monkeypatch)
    assert max((a - b).abs().max() for a, b in zip(got, alone, strict=True)) > 1e-4
    for a, b, c in zip(alone, got, twice, strict=True):
        torch.testing.assert_close(c - a, 2 * (b - a), rtol=2e-3, atol=1e-6)
    heads = with_it.method.beside["discriminator"]
    assert heads.optimizer is not None
    assert any((state["exp_avg"] != 0).any() for state in heads.optimizer.state.values())


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"steps": 2, "adversary": {}})
    trainer.train_step()
    with NoHostSync():
        trainer.train_step()


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}}, {"precision": "fp16"}], ids=["whole", "lora", "fp16"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, student: dict[str, Any]) -> None:
    """The fake network, its optimizer and its loss scale too."""
    method = {"adversary": {"lr": 1e-3}, "fake": {"updates": 2, "lr": 1e-3}}
    train = {"steps": 4, "prompts_per_step": 2}
    make(tmp_path / "whole", method, student=student, train=train).run()
    make(tmp_path / "half", method, student=student, train=train | {"steps": 2}).run()
    rest = make(tmp_path / "half", method, student=student, train=train)
    rest.resume()
    rest.run()
    assert differences(tmp_path / "half", tmp_path / "whole") == []


def test_it_goes_on_in_another_precision(tmp_path: Path) -> None:
    make(tmp_path, student={"precision": "fp16"}, train={"steps": 1}).run()
    for precision in ("bf16", "fp16"):
        trainer = make(tmp_path, student={"precision": precision}, train={"steps": 1})
        trainer.resume()
        trainer.train_step()
        assert trainer.step == 2


def test_an_update_that_the_student_skips_is_skipped_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, {"adversary": {}})
    monkeypatch.setattr(trainer.update, "clip", lambda: (torch.zeros(()), torch.tensor(False)))
    nets = [each.net for each in trainer.method.beside.values()]
    before = [p.clone() for net in nets for p in net.parameters()]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, (p for net in nets for p in net.parameters()), strict=True))
    assert int(trainer.guard.total) == 1


def test_a_fake_network_whose_gradient_is_not_finite_counts_as_a_skipped_update(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    fake = method_of(trainer).fake
    fake.parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    before = [p.detach().clone() for p in fake.parameters]
    trainer.train_step()
    assert int(trainer.guard.total) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, fake.parameters, strict=True))


def test_a_step_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"adversary": {}}, train={"prompts_per_rollout": 2})
    asked = iter([False, True])
    assert not trainer.train_step(lambda: next(asked))
    assert not method_of(trainer)._seen
    assert all(p.grad is None for each in trainer.method.beside.values() for p in each.net.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_steps_move_both(tmp_path: Path, precision: str) -> None:
    config = tiny_config(tmp_path, method={"name": "dmd2", "fake": {"updates": 1}}, student={"precision": precision})
    wide = {"attention_head_dim": 32, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    trainer = Trainer(config, CPU, tiny_parts(config, **wide))
    if precision == "fp16":  # else many steps are skipped until the scales have come down
        for scaler in (trainer.scaler, method_of(trainer).fake.scaler):
            scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    nets = trainer.student, method_of(trainer).fake.net
    before = [net.backbone.proj_out.weight.detach().clone() for net in nets]
    for _ in range(3):
        trainer.train_step()
    for weight, net in zip(before, nets, strict=True):
        after = net.backbone.proj_out.weight
        assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(weight, after)


def test_what_a_rank_holds(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    held, numbers = holdings(trainer), sum(p.numel() for p in trainer.parameters)
    assert (held["fake"], held["fake's gradients"]) == (4 * numbers, 4 * numbers)
    assert held["fake's optimizer"] == held["optimizer"] and "discriminator" not in held
    half = on_a_rank(held, 2, accumulates=True)
    assert half["fake"] == held["fake"] // 2 and half["fake's gradients"] == held["fake's gradients"]


def test_with_adapters_both_share_the_teachers_weights(tmp_path: Path) -> None:
    held = holdings(make(tmp_path, student={"lora": {"rank": 2}}))
    assert held["fake"] == held["student"] < held["teacher"] / 2


def test_the_fake_network_follows_a_student_that_does_not_move(tmp_path: Path) -> None:
    fake = {"lr": 3e-3, "updates": 8}
    train = {"steps": 4, "prompts_per_step": 4}
    trainer = make(tmp_path, {"fake": fake}, optimizer={"lr": 1e-12}, train=train, log={"every": 2})
    (batch,) = trainer.source(0)

    def loss() -> float:
        """On samples and times that are the same each time."""
        with torch.no_grad():
            return method_of(trainer)._followed(trainer.student, batch, 0, 0, " of the test").item()

    before = loss()
    trainer.run()
    assert loss() < 0.9 * before
    rows = metrics(tmp_path)
    assert {"loss", "error", "kept", "fake_loss"} <= rows[0].keys() and {"r", "g_norm"}.isdisjoint(rows[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"fake": {"updates": 0}}}, "method.fake.updates = 0: should be greater than 0"),
        ({"method": {"noise": {"low": 0.9, "high": 0.5}}}, "method.noise.low = 0.9: should be below .* = 0.5"),
        ({"method": {"route": {"points": 4}}}, r"unknown key 'method.route'.*\(method.name=dmd2\)"),
        (
            {"method": {"adversary": {}}, "data": {"images": None}},
            "method.name=dmd2 with method.adversary needs data.images",
        ),
        (
            {"method": {"fake": {"optimizer": "came"}}, "parallel": {"mode": "fsdp"}},
            "parallel.mode=fsdp needs method.fake.optimizer=adamw",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make(tmp_path, change.get("method"), **{key: value for key, value in change.items() if key != "method"})
    assert "\n" not in str(caught.value)
