"""PCM in the trainer: of one phase it is LCM, its adversary's gradient, its state, and how its students are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from end_state import differences
from helpers import NoHostSync
from tiny import gradients, tiny_config, tiny_parts
from torch import Tensor

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.inference.exporting import check_jumps
from tbcm.inference.generation import NoiseSource, Sampler
from tbcm.inference.student import Origin
from tbcm.models.pipeline import Pipeline
from tbcm.training.holdings import holdings
from tbcm.training.methods.adversary import draw_shown
from tbcm.training.methods.pcm import Pcm
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
ADVERSARY = {"weight": 0.7, "lr": 1e-3}


def make(out: Path, method: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    given = {"name": "pcm", "phases": 2} | (method or {})
    config = tiny_config(out, method={key: value for key, value in given.items() if value is not None}, **sections)
    trainer = Trainer(config, CPU, tiny_parts(config))
    with torch.no_grad():  # a student that is not its teacher
        for i, parameter in enumerate(trainer.parameters):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return trainer


def method_of(trainer: Trainer) -> Pcm:
    assert isinstance(trainer.method, Pcm)
    return trainer.method


def test_of_one_phase_it_is_lcm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"target_decay": 0.5, "solver": {"skip": 50}}
    one = gradients(make(tmp_path / "pcm", {"phases": 1, **same}), monkeypatch)
    lcm = gradients(make(tmp_path / "lcm", {"name": "lcm", "phases": None, **same}), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(one, lcm, strict=True))
    two = gradients(make(tmp_path / "two", {"phases": 2, **same}), monkeypatch)
    assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(two, lcm, strict=True))


def adversarial(trainer: Trainer) -> list[Tensor]:
    """The gradient of -mean D(features(noised f_theta)), each formula written out."""
    method, sigma = method_of(trainer), trainer.config.method.sigma_data
    assert method.adversary is not None and trainer.config.method.adversary is not None
    (batch,) = trainer.source(0)
    way, scores = batch.trajectory, []
    for i in range(way.t.shape[1]):
        x, t, w = way.x[:, i], way.t[:, i], way.guidance
        law = trainer.config.method.adversary, trainer.teacher.t_max, sigma, CPU
        s, noise = draw_shown(0, 0, f"fake of point {i}", 4, x.shape[1:], *law)
        # Of two phases even in q, s = 3 q / (1 + 2 q), the edge is at q = 1/2: flow time 3/4.
        edge = torch.atan2(torch.tensor(0.75), torch.tensor(0.25))
        e = torch.where(t > edge + 1e-5, edge, 0.0)
        q = s.tan() / (1 + s.tan())
        q = q / (3 - 2 * q) / 2 + torch.where(t > edge + 1e-5, 0.5, 0.0)
        s = torch.atan2(3 * q / (1 + 2 * q), (1 - q) / (1 + 2 * q))
        t, s, e = (angle[:, None, None, None] for angle in (t, s, e))
        F = trainer.student(x / sigma, way.t[:, i], batch.condition, w).F
        fake = (t - e).cos() * x - (t - e).sin() * sigma * F
        fresh = (s.sin() ** 2 - (s.cos() * e.tan()) ** 2).clamp(min=0).sqrt()
        seen = s.cos() / e.cos() * fake + fresh * sigma * noise
        features = trainer.teacher.features(seen / sigma, s.flatten(), batch.condition, w, method.adversary.layers)
        scores.append(method.adversary.heads(features, (8, 8)).mean(1))
    answer = torch.autograd.grad(-torch.cat(scores).mean(), trainer.parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(answer, trainer.parameters, strict=True)]


def test_with_an_adversary_the_gradient_has_its_weighted_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filtered = {"brightness_threshold": 0.0}
    trainer = make(tmp_path / "with", {"adversary": ADVERSARY, **filtered})
    wanted = adversarial(trainer)
    both = gradients(trainer, monkeypatch)
    alone = gradients(make(tmp_path / "without", filtered), monkeypatch)
    assert max(g.abs().max() for g in wanted) > 1e-4
    for got, own, other in zip(both, alone, wanted, strict=True):
        torch.testing.assert_close(got, own + 0.7 * other, rtol=2e-3, atol=1e-6)


def test_micro_batches_change_no_gradient_of_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "whole", {"adversary": ADVERSARY})
    first = gradients(whole, monkeypatch)
    for i, train in enumerate(({"prompts_per_micro_batch": 3}, {"points_per_micro_batch": 3})):
        parts = make(tmp_path / str(i), {"adversary": ADVERSARY}, train=train)
        for a, b in zip(first, gradients(parts, monkeypatch), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)
        heads = (method_of(each).beside["discriminator"].net.parameters() for each in (whole, parts))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*heads, strict=True))


def test_a_dropped_prompt_adds_nothing_to_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, {"adversary": ADVERSARY, "brightness_threshold": 1e12})
    assert all((g == 0).all() for g in gradients(trainer, monkeypatch))
    heads = method_of(trainer).beside["discriminator"]
    assert all((state["exp_avg"] == 0).all() for state in heads.optimizer.state.values())  # type: ignore[union-attr]


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"adversary": ADVERSARY, "target_decay": 0.9, "samples": "images"})
    trainer.train_step()
    with NoHostSync():
        trainer.train_step()


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    method = {"adversary": ADVERSARY, "target_decay": 0.5}
    make(tmp_path / "whole", method).run()
    make(tmp_path / "half", method, train={"steps": 4}).run()
    rest = make(tmp_path / "half", method)
    rest.resume()
    rest.run()
    assert differences(tmp_path / "half", tmp_path / "whole") == []


def test_a_step_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"adversary": ADVERSARY}, train={"prompts_per_rollout": 2})
    asked = iter([False, True])
    assert not trainer.train_step(lambda: next(asked))
    heads = method_of(trainer).beside["discriminator"].net
    assert all(p.grad is None for p in heads.parameters())


def test_what_a_rank_holds(tmp_path: Path) -> None:
    held = holdings(make(tmp_path, {"adversary": ADVERSARY, "target_decay": 0.5}))
    assert held["target"] == held["average"] and held["discriminator"] > 0
    assert {"target", "discriminator"}.isdisjoint(holdings(make(tmp_path)))


@pytest.fixture
def sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Of a student of two phases."""
    config: Config = tiny_config(tmp_path, method={"name": "pcm", "phases": 2})
    monkeypatch.setattr(Pipeline, "check_size", lambda self, size: None)
    monkeypatch.setattr(Pipeline, "latent_shape", lambda self, size: (4, 8, 8))
    parts = tiny_parts(config)
    return Sampler(parts.student, parts.text, config, Pipeline("unused"), teacher=False)


def test_a_student_is_sampled_in_as_many_steps_as_it_has_phases(sampler: Sampler) -> None:
    assert sampler.default_steps == 2
    condition, sigma = sampler.text(["red cat", "blue dog"], (64, 64)), 0.5
    found = sampler.sample(condition, NoiseSource(0, range(2), (4, 8, 8), CPU), 2, 3.0)
    x, w = sigma * NoiseSource(0, range(2), (4, 8, 8), CPU)(), torch.full((2,), 3.0)
    middle = torch.atan2(torch.tensor(0.75), torch.tensor(0.25))
    for t, end in ((torch.tensor(torch.pi / 2), middle), (middle, torch.tensor(0.0))):
        with torch.no_grad():
            F = sampler.net(x / sigma, t.expand(2), condition, w).F
        x = (t - end).cos() * x - (t - end).sin() * sigma * F
    torch.testing.assert_close(found, x / sigma, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_and_in_no_other_number(sampler: Sampler, steps: int) -> None:
    with pytest.raises(UserError, match=rf"student of 2 phases .* sampled in 2 steps, not {steps}"):
        sampler.latents(["red cat"], steps=steps)


def test_it_cannot_be_exported_but_of_one_phase(tmp_path: Path) -> None:
    for phases in (1, 2):
        origin = Origin("runs/x", tiny_config(tmp_path, method={"name": "pcm", "phases": phases}), is_run=True)
        if phases == 1:
            check_jumps(origin)
            continue
        with pytest.raises(UserError, match=r"runs/x: a student of 2 phases .* cannot be exported"):
            check_jumps(origin)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"phases": 0}}, "method.phases = 0: should be greater than 0"),
        ({"method": {"phases": 60}}, "method.phases = 60: a phase is shorter than a step of the solver, 20 of 1000"),
        ({"method": {"adversary": {"max_time": 0.5}}}, "unknown key 'method.adversary.max_time'"),
        (
            {"method": {"adversary": {"layers": [7]}}},
            r"adversary.layers = \[7\]: the teacher's blocks are 0 to 1",
        ),
        (
            {"method": {"adversary": {}}, "teacher": {"fp8": True}},
            "method.name=pcm with method.adversary needs teacher.fp8=false",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make(tmp_path, change.get("method"), **{key: value for key, value in change.items() if key != "method"})
    assert "\n" not in str(caught.value)
