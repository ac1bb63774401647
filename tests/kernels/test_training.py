"""A training with kernels is the training without them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families.test_students import prepared
from helpers import random_condition, tiny_sana
from speed import arms
from tbcm_kernels import attention_forward, dispatch
from tbcm_kernels.launch import launch
from torch import Tensor

from tbcm.method.types import Condition
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.presets import SANA
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def losses(device: torch.device, steps: int) -> list[Tensor]:
    """Of a training of the tiny network in fp32. With r = 1 from the start: a student that equals its teacher has a
    tangent of rounding errors alone, which an optimiser blows up to any size."""
    config = arms.config("tiny", "dual", "tbcm", samples=2, points=3, device=CPU)
    sections = {
        "teacher": {"precision": "fp32"},
        "student": {"precision": "fp32", "checkpointing": "none"},
        "method": {"r": config.method.r.model_copy(update={"warmup_steps": 0, "cooldown_start": None, "final": 1.0})},
    }
    update = {name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    side = 64 if device.type == "cuda" else 16
    config = config.model_copy(update=update | {"resolution": ((side, side),)})
    torch.manual_seed(0)
    trainer = Trainer(config, device, random_parts(config, device))
    found: list[Tensor] = []
    trainer.statistics.add_loss = lambda loss: found.append(loss.detach().clone())  # type: ignore[method-assign]
    for _ in range(steps):
        trainer.train_step()
    return found


def test_the_loss_curve_is_the_same(
    kernels: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 in the first step, and to 1e-3 in those that follow: rounding grows, as an optimiser that normalises
    makes full steps of gradients that are nearly zero. 100 steps on a GPU; 2, of a smaller network, in the interpreter.
    """
    steps = 100 if kernels.type == "cuda" else 2
    if kernels.type == "cpu":
        monkeypatch.setitem(SANA, "tiny", SANA["tiny"] | {"num_layers": 1})
    fused = losses(kernels, steps)
    assert "no kernel" not in caplog.text
    with dispatch.using("off"):
        plain = losses(kernels, steps)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=0)
    assert not all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True)), "no kernel ran"


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_block_runs_them_too(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, tangent and gradients of a compiled network of kernels are those of the eager one without."""
    if kernels.type == "cpu":  # all that inductor would add there is a minute of C++ compilation
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    sizes = {"attention_head_dim": 16, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 1}
    u, du, out = (torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(i)).to(kernels) for i in range(3))
    t, dt, w = (torch.tensor(x, device=kernels) for x in ([0.7, 1.2], [0.3, 0.2], [4.0, 4.0]))
    text = random_condition(1)
    condition = Condition({name: tensor.to(kernels) for name, tensor in text.tensors.items()})

    def answer(compiled: bool) -> list[Tensor]:
        backbone = tiny_sana(guidance_embeds=True, **sizes)
        net = SanaTrigFlow(backbone, timestep_scale=1.0, compiled=compiled).to(kernels)
        prediction = net(u, t, condition, w, (du, dt))
        assert prediction.dF is not None
        prediction.F.backward(out)
        return [prediction.F, prediction.dF, *(p.grad for p in net.parameters() if p.grad is not None)]

    fused = answer(compiled=True)
    with dispatch.using("off"):
        plain = answer(compiled=False)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_a_network_of_another_family_runs_them_too(
    kernels: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, derivative and gradients of PixArt, whose text has a mask and no tangent, are those without kernels."""
    dtype, tolerance = (torch.float64, 1e-9) if kernels.type == "cpu" else (torch.float32, 1e-4)
    student, condition, u, t = prepared("pixart_alpha", dtype)
    student, w = student.to(kernels), torch.full((2,), 4.0, dtype=dtype, device=kernels)
    text = {name: tensor[:, :20].to(kernels) for name, tensor in condition.tensors.items()}
    condition = Condition(text, condition.static)
    u, t = u[:2].to(kernels), t[:2].to(kernels)
    launched: list[object] = []
    monkeypatch.setattr(attention_forward, "launch", lambda *given, **named: launched.append(launch(*given, **named)))

    def answer() -> list[Tensor]:
        student.zero_grad()
        prediction = student(u, t, condition, w, (u.sin(), torch.ones_like(t)))
        assert prediction.dF is not None
        prediction.F.square().sum().backward()
        return [prediction.F, prediction.dF, *(p.grad for p in student.parameters() if p.grad is not None)]

    fused = answer()
    assert launched and "no kernel" not in caplog.text
    with dispatch.using("off"):
        plain = answer()
    largest = max(float(x.detach().abs().max()) for x in plain)
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance * largest)
