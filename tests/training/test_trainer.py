"""The loop: what it optimises, that it can stop anywhere and go on, and that it never reads the device in between."""

from __future__ import annotations

import errno
import logging
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import NoHostSync
from tiny import gradients, metrics, tiny_config, tiny_parts
from torch import Tensor

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.models.pipeline import Pipeline
from tbcm.runtime import checkpoint
from tbcm.samples.rollouts import Stream, draw, draw_route
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def make(out: Path, **sections: dict[str, Any]) -> Trainer:
    config: Config = tiny_config(out, **sections)
    return Trainer(config, CPU, tiny_parts(config))


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Everything a run changes, by name."""
    found = {f"student/{k}": v for k, v in trainer.student.state_dict().items()}
    found |= {f"ema/{k}": v for k, v in trainer.ema.shadow.items()}
    for i, state in enumerate(trainer.optimizer.state.values()):
        found |= {f"optimizer/{i}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: v.detach().clone() for k, v in found.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, optimizer: str) -> None:
    whole = make(tmp_path / "whole", optimizer={"name": optimizer})
    whole.run()
    half = make(tmp_path / "half", optimizer={"name": optimizer}, train={"steps": 3})
    half.run()
    rest = make(tmp_path / "half", optimizer={"name": optimizer})
    rest.resume()
    assert rest.step == 3
    rest.run()
    assert_equal(tensors(whole), tensors(rest))
    assert [row["step"] for row in metrics(tmp_path / "half")] == [2, 3, 4, 6]


def test_ctrl_c_during_a_step_saves_and_the_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole")
    whole.run()
    stopped = make(tmp_path / "stopped")
    original = stopped.source._batch

    def interrupt(*arguments: Any) -> Any:
        if stopped.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(stopped.source, "_batch", interrupt)
    assert stopped.run() is True
    assert stopped.step == 2  # the step was given up
    rest = make(tmp_path / "stopped")
    rest.resume()
    assert rest.run() is False
    assert_equal(tensors(whole), tensors(rest))


def test_a_time_limit_stops_and_saves(tmp_path: Path) -> None:
    trainer = make(tmp_path, train={"max_minutes": 1e-9, "steps": 50})
    assert trainer.run() is False
    assert trainer.step == 0
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000000"


def test_micro_batches_and_accumulation_give_the_gradient_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(make(tmp_path), monkeypatch)
    for train in (
        {"prompts_per_rollout": 1},
        {"points_per_micro_batch": 2},
        {"prompts_per_rollout": 3},
        {"prompts_per_micro_batch": 1, "points_per_micro_batch": 2},
        {"prompts_per_rollout": 2, "prompts_per_micro_batch": 1},
    ):
        parts = gradients(make(tmp_path, train=train), monkeypatch)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in whole) > 1e-3


def test_two_pass_and_checkpointed_steps_have_the_gradient_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = gradients(make(tmp_path), monkeypatch)
    ways = {"tangent": "two_pass"}, {"checkpointing": "full"}, {"checkpointing": "selective"}, {"derivative": "jvp"}
    for student in ways:
        other = gradients(make(tmp_path, student=student), monkeypatch)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_draws_are_a_function_of_seed_and_step_and_of_the_place_in_the_global_batch() -> None:
    method = tiny_config(Path("unused")).method

    def drawn(seed: int, step: int) -> Any:
        def routes(stream: Stream) -> Tensor:
            return draw_route(method.route, 4, torch.pi / 2, method.sigma_data, stream("route"))

        return draw(seed, step, 4, (4, 8, 8), method.guidance, routes, CPU)

    a, again, later, other = drawn(0, 7), drawn(0, 7), drawn(0, 8), drawn(1, 7)
    assert torch.equal(a.noise, again.noise) and torch.equal(a.route, again.route)
    assert not torch.equal(a.noise, later.noise) and not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.noise[0], a.noise[1])
    assert torch.equal(a[slice(1, 3)].noise, a.noise[1:3]) and torch.equal(a[slice(1, 3)].route, a.route[1:3])
    assert set(torch.cat([drawn(0, step).guidance for step in range(20)]).tolist()) == {2.0, 3.0}


def test_prompts_come_in_the_same_order_whatever_the_rollout(tmp_path: Path) -> None:
    whole = list(make(tmp_path).source(3))
    parts = list(make(tmp_path, train={"prompts_per_rollout": 3}).source(3))
    assert [len(b.condition) for b in parts] == [3, 1]
    torch.testing.assert_close(
        torch.cat([b.trajectory.x0 for b in parts]), whole[0].trajectory.x0, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("at_once", "of_rollout", "batches"),
    [(None, None, [4]), (None, 3, [3, 1]), (3, None, [3, 1]), (2, 1, [1, 1, 1, 1]), (3, 3, [3, 1])],
)
def test_a_rollout_is_dealt_out_in_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None, of_rollout: int | None, batches: list[int]
) -> None:
    """The teacher is asked for all prompts of a rollout at once, and what it answers is the very tensors."""
    train = {"prompts_per_rollout": at_once, "prompts_per_micro_batch": of_rollout}
    trainer, asked = make(tmp_path, train=train), []
    guided = trainer.teacher.guided

    def counted(*arguments: Any) -> Any:
        velocity = guided(*arguments)
        return lambda u, t: (asked.append(len(u)), velocity(u, t))[1]

    monkeypatch.setattr(trainer.teacher, "guided", counted)
    made = list(trainer.source(3))
    assert [len(b.keep) for b in made] == batches and trainer.source.batches == len(batches)
    rollouts = [4] if at_once is None else [at_once, 4 - at_once]
    points = trainer.config.method.points
    assert asked == [prompts for prompts in rollouts for _ in range(points)]

    whole = list(make(tmp_path, train={"prompts_per_rollout": at_once}).source(3))
    for name in ("x", "dxdt", "t", "x0", "guidance"):
        a, b = (torch.cat([getattr(batch.trajectory, name) for batch in each]) for each in (made, whole))
        assert torch.equal(a, b)
    assert torch.equal(*(torch.cat([batch.keep for batch in each]) for each in (made, whole)))
    texts = (torch.cat([batch.condition.tensors["embeds"] for batch in each]) for each in (made, whole))
    assert torch.equal(*texts)


def test_the_average_student_moves_and_is_saved(tmp_path: Path) -> None:
    """Elsewhere an EMA flag exists, and the average is neither updated nor saved."""
    trainer = make(tmp_path, ema={"kind": "halflife", "halflife_steps": 2.0})
    start = {k: v.clone() for k, v in trainer.ema.shadow.items()}
    trainer.run()
    weights = dict(trainer.student.named_parameters())
    name = "backbone.proj_out.weight"
    assert not torch.equal(trainer.ema.shadow[name], start[name])
    assert not torch.equal(trainer.ema.shadow[name], weights[name])
    fresh = make(tmp_path)
    fresh.resume()
    assert torch.equal(fresh.ema.shadow[name], trainer.ema.shadow[name])


def test_dark_samples_are_dropped_and_add_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the filter crashes with a NameError on the first dark sample."""
    assert len(gradients(make(tmp_path / "a"), monkeypatch)) > 0
    everything = gradients(make(tmp_path / "b", method={"brightness_threshold": 1e12}), monkeypatch)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in everything)
    some = make(tmp_path / "c", method={"brightness_threshold": 3.0}, train={"steps": 12}, log={"every": 12})
    some.run()
    assert 0 < metrics(tmp_path / "c")[-1]["kept"] < 1


def test_a_preview_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Pipeline, *arguments: object) -> None:
        raise UserError("no VAE here")

    monkeypatch.setattr(Pipeline, "load_vae", fail)
    monkeypatch.setattr(Pipeline, "index", {"_class_name": "SanaPipeline"})
    monkeypatch.setattr(
        Pipeline, "config", lambda self, part: {"in_channels": 4, "patch_size": 1, "timestep_scale": 0.001}
    )
    monkeypatch.setattr(Pipeline, "compression", 8)
    monkeypatch.setattr(Pipeline, "sampling_shift", 1.0)
    trainer = make(tmp_path, log={"preview_every": 2})
    monkeypatch.setattr(logging.getLogger("tbcm"), "propagate", True)
    trainer.run()
    assert trainer.step == 6 and "no preview at step 2: no VAE here" in caplog.text


def test_without_previews_no_vae_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Pipeline, dtype: torch.dtype) -> None:
        raise AssertionError("the VAE was loaded")

    monkeypatch.setattr(Pipeline, "load_vae", refuse)
    make(tmp_path).run()


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_reads_nothing_from_the_device(tmp_path: Path, optimizer: str, checkpointing: str) -> None:
    """Elsewhere a step synchronises more than 30 times."""
    train = {"points_per_micro_batch": 2, "overlap_rollout": True}
    trainer = make(tmp_path, optimizer={"name": optimizer}, student={"checkpointing": checkpointing}, train=train)
    trainer.train_step()
    with NoHostSync():
        trainer.train_step()
    with pytest.raises(AssertionError, match="in a step"), NoHostSync():
        torch.ones(()).item()


@pytest.mark.usefixtures("fresh_compiler")
def test_nothing_is_compiled_after_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(None)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    config = tiny_config(
        tmp_path, student={"compile": True}, teacher={"compile": True}, train={"points_per_micro_batch": 1}
    )
    trainer = Trainer(config, CPU, tiny_parts(config))
    for _ in range(2):
        trainer.train_step()
    assert len(graphs) == 2  # a block of the teacher and one of the student, whatever the depth
    for _ in range(3):
        trainer.train_step()
    assert len(graphs) == 2


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Makes the gradient NaN in the given steps."""
    weight = trainer.student.backbone.proj_out.weight
    weight.register_hook(lambda grad: grad * float("nan") if trainer.step in steps else grad)


def test_a_non_finite_gradient_skips_the_update_and_is_counted(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    poison(trainer, {1})
    trainer.train_step()
    before = tensors(trainer)
    trainer.train_step()
    assert_equal(before, tensors(trainer))
    trainer.train_step()
    assert not torch.equal(before["student/backbone.proj_out.weight"], trainer.student.backbone.proj_out.weight)
    assert int(trainer.guard.total) == 1


def test_a_non_finite_loss_skips_the_update(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    before = tensors(trainer)
    with torch.no_grad():
        trainer.student.logvar_head.bias.fill_(float("inf"))
    trainer.train_step()
    after = tensors(trainer)
    assert all(torch.equal(after[k], before[k]) for k in before if "logvar_head.bias" not in k)
    assert int(trainer.guard.total) == 1


def test_too_many_non_finite_updates_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, train={"steps": 40, "max_non_finite": 4}, checkpoint={"every": 2})
    poison(trainer, set(range(3, 40)))
    with pytest.raises(UserError, match=r"not finite in \d+ updates in a row at step \d+.*step-0000000\d"):
        trainer.run()
    fresh = make(tmp_path)
    fresh.resume()
    assert all(torch.isfinite(v).all() for v in tensors(fresh).values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_steps_are_finite_and_move_the_student(tmp_path: Path, precision: str) -> None:
    config = tiny_config(tmp_path, student={"precision": precision})
    # Heads of 32 as in the published models: with 8, a query's ReLU is often nearly all zero, and its gradient then
    # overflows fp16.
    wide = {"attention_head_dim": 32, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    trainer = Trainer(config, CPU, tiny_parts(config, **wide))
    before = trainer.student.backbone.proj_out.weight.detach().clone()
    for _ in range(3 if precision == "bf16" else 15):  # fp16's loss scale first has to come down from 65,536
        trainer.train_step()
    after = trainer.student.backbone.proj_out.weight
    assert after.dtype == torch.float32 and torch.isfinite(after).all() and not torch.equal(before, after)


def test_metrics_say_what_is_promised(tmp_path: Path) -> None:
    make(tmp_path).run()
    row = metrics(tmp_path)[-1]
    promised = {
        "loss",
        "error",
        "g_norm",
        "r",
        "kept",
        "samples_per_s",
        "peak_gib",
        "grad_norm",
        "lr",
        "skipped_updates",
    }
    assert promised <= row.keys() and {f"logvar_by_t/{i}" for i in range(8)} <= row.keys()
    assert row["r"] == 1.0 and row["kept"] == 1.0 and row["samples_per_s"] > 0


def test_the_learning_rate_warms_up_stays_and_cools_down_to_the_end(tmp_path: Path) -> None:
    sections = {"optimizer": {"lr": 1.0, "warmup_steps": 3, "cooldown_steps": 4}, "train": {"steps": 10}}
    rate = make(tmp_path, **sections).learning_rate
    assert [rate(step) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_resumed_run_says_that_its_prompts_have_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path)
    trainer.save()
    trainer.writer.wait()
    make(tmp_path).resume()
    assert "the configuration is not the checkpoint's" not in caplog.text
    config = tiny_config(tmp_path)
    parts = replace(tiny_parts(config), prompts=list(reversed(tiny_parts(config).prompts)))
    Trainer(config, torch.device("cpu"), parts).resume()
    assert "the configuration is not the checkpoint's: data.prompts_digest" in caplog.text


def test_a_checkpoint_that_could_not_be_written_is_made_up_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk on which there is room again: the run goes on, with a checkpoint of the step that it had reached."""
    real, calls = dcp.save, []

    def save(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(dcp, "save", save)
    trainer = make(tmp_path, checkpoint={"every": 4}, train={"steps": 6, "prompts_per_step": 2})
    assert not trainer.run() and trainer.step == 6
    assert "the disk is full" in caplog.text and "in its place" in caplog.text
    assert trainer.writer.saved is not None and trainer.writer.saved[0] == 6


@pytest.mark.parametrize("after", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("before", ["fp32", "bf16", "fp16"])
def test_a_run_goes_on_in_any_precision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    """As `precision: auto` has it where a run moves to another kind of GPU."""
    first = make(tmp_path, student={"precision": before})
    if before == "fp16":
        first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 256.0, "_growth_tracker": 7})
    first.save()
    first.writer.wait()
    then = make(tmp_path, student={"precision": after})
    then.resume()
    assert_equal(tensors(first), tensors(then))
    kept = {"scale": 256.0, "_growth_tracker": 7} if before == "fp16" else {"scale": 65536.0, "_growth_tracker": 0}
    assert after != "fp16" or then.scaler.state_dict().items() >= kept.items()
    said = [record.message for record in caplog.records if "loss scale" in record.message]
    changed = (before == "fp16") != (after == "fp16")
    assert len(said) == changed
    assert not changed or ("it begins anew" if after == "fp16" else "it is left out") in said[0]
    then.train_step()
    assert then.step == 1
