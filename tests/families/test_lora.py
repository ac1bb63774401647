"""Students of other families with adapters: start, derivative, gradients, and a whole run of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from end_state import read
from families.test_teachers import W, network
from families.test_training import CPU, draws_the_same, written
from families.tiny import BUILDERS, make
from families.wide import Wide
from safetensors.torch import load_file
from torch import Tensor, nn

from tbcm.config.sections import Lora
from tbcm.errors import UserError
from tbcm.inference.adapter import adapter_pipeline, export_adapter
from tbcm.inference.exporting import export
from tbcm.inference.generation import open_sampler
from tbcm.inference.student import open_origin
from tbcm.method.types import Condition
from tbcm.models.families.rows import family_of
from tbcm.models.loading import freeze, general_student
from tbcm.models.lora import DEFAULT_TARGETS, adapted, factors, matching, merge
from tbcm.models.network import DiffusersNetwork
from tbcm.setup.parts import build_parts
from tbcm.training.holdings import holdings
from tbcm.training.trainer import Trainer

NAMES = ["sdxl", "sd3", "flux", "chroma", "zimage", "sana", "dit", "ddpm", "wan", "lumina2"]
"""Of each kind of network and of time embedding one."""
LORA: dict[str, Any] = {"rank": 2, "alpha": 3.0}


def prepared(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[DiffusersNetwork, DiffusersNetwork, Condition, Tensor, Tensor]:
    """A tiny teacher, its student, the condition of two prompts, and two points (u, t) each."""
    tiny = make(name, dtype)
    teacher, latents = network(tiny)
    freeze(teacher)
    condition, _ = family_of(type(tiny.pipe).__name__).encode(tiny.pipe, tiny.prompts, **tiny.size)
    torch.manual_seed(0)
    student = general_student(
        teacher,
        lora=Lora(**LORA),
        tangent="one_pass",
        checkpointing="none",
        compiled=False,
        guidance_embeds_scale=None,
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(4, *teacher.family.layout.shape(latents), generator=generator, dtype=torch.float64).to(dtype)
    return teacher, student, condition, u, torch.tensor([0.3, 0.7, 1.1, 1.4], dtype=dtype)


def move(student: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", NAMES)
def test_a_student_with_adapters(name: str) -> None:
    """It starts as its teacher exactly, and shares its weights. Moved, it has the value of the network with the
    adapters in its weights, the derivative of finite differences, and the gradients that follow from that network's."""
    teacher, student, condition, u, t = prepared(name)
    w = torch.full((4,), W, dtype=u.dtype)
    with torch.no_grad():
        before = teacher(u, t, condition, w).F
        assert torch.equal(student(u, t, condition, w).F, before)
    assert {id(p) for p in student.parameters() if not p.requires_grad} == {id(p) for p in teacher.parameters()}
    move(student)
    du = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=u.dtype)
    dt, h = torch.tensor([0.4, -0.2, 0.3, 0.1], dtype=u.dtype), 1e-6
    with Wide():
        answer = student(u, t, condition, w, (du, dt))
        with torch.no_grad():
            ahead, behind = (student(u + s * du, t + s * dt, condition, w).F for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert answer.dF is not None and not answer.dF.requires_grad
    bound = 1e-3 if name == "sana" else 1e-5  # its attention has ReLUs, whose kinks differences straddle
    assert float((answer.dF - difference).norm() / difference.norm()) < bound
    plain = merged(student)
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(3), dtype=u.dtype)
    with Wide():
        expected = plain(u, t, condition, w).F
        (expected * weight).sum().backward()
        (answer.F * weight).sum().backward()
    torch.testing.assert_close(answer.F, expected, rtol=1e-8, atol=1e-9)
    whole, own = dict(plain.named_parameters()), dict(student.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in own.values() if p.grad is not None)
    for layer_name, layer in adapted(student).items():
        gradient = whole[f"{layer_name}.weight"].grad
        if gradient is None:  # of a last block's text, which goes nowhere
            continue
        gradient = gradient.flatten(1)
        a, b = (x.detach().flatten(1) for x in factors(layer))  # a convolution's, too
        for part, wanted in (("lora_A", b.mT @ gradient), ("lora_B", layer.scaling["default"] * gradient @ a.mT)):
            got = own[f"{layer_name}.{part}.default.weight"].grad.flatten(1)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8 * largest, msg=f"{layer_name} {part}")
    with torch.no_grad():
        assert torch.equal(teacher(u, t, condition, w).F, before)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_shared_weights_in_half_precision_are_computed_with_under_autocast(name: str) -> None:
    """Values, tangents and gradients of adapters in fp32: about those of the network in fp32."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        _, student, condition, u, t = prepared(name, torch.float32)
        for parameter in student.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        move(student)
        w = torch.full((4,), W)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            answer = student(u, t, condition, w, (torch.ones_like(u), torch.ones_like(t)))
            answer.F.float().square().sum().backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert answer.dF is not None and all(g.dtype == torch.float32 for g in gradients)
        found.append((answer.F.detach().float(), answer.dF.float(), torch.cat([g.flatten() for g in gradients])))
    for exact, got in zip(*found, strict=True):
        assert float((got - exact).norm() / exact.norm()) < 0.1


def merged(student: DiffusersNetwork) -> DiffusersNetwork:
    """A plain network with the adapters in weights of its own."""
    backbone = copy.deepcopy(student.backbone)
    for module in backbone.modules():
        module._forward_hooks.clear()
    merge(backbone)
    plain = DiffusersNetwork(backbone.requires_grad_(), student.family, student.formulation, student.channels)
    plain.guidance_embedding = copy.deepcopy(student.guidance_embedding)
    return plain


_BRANCHES = "attn|attn1|attn2|attention|attentions|ff|ff_context|ffn|feed_forward|img_mlp|txt_mlp"
_LAYERS = re.compile(rf".*\.({_BRANCHES})\.(?!.*transformer_blocks).*|single_transformer_blocks\.\d+\.proj_(mlp|out)")


_OF_UNET = re.compile(r".*attentions\.\d+\.proj_(in|out)")
"""Around its transformers."""


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_default_targets_are_all_of_attention_and_feed_forward(name: str) -> None:
    """Every matrix within a module of such a name, and nothing else."""
    backbone = network(make(name))[0].backbone
    matrices = [key for key, layer in backbone.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    matrices = [key for key in matrices if not key.endswith("conv_depth")]  # by channel: no matrix
    found = matching(DEFAULT_TARGETS, matrices, name)
    wanted = [key for key in matrices if _LAYERS.fullmatch(key) and not _OF_UNET.fullmatch(key)]
    assert found == wanted and found


# Whole runs


def run(name: str, folder: Path, **train: Any) -> Trainer:
    config = written(name, folder, {"lora": LORA}, **train)
    return Trainer(config, CPU, build_parts(config, CPU))


def trained(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "sana"])
def test_train_resume_and_export_the_adapter(name: str, tmp_path: Path) -> None:
    trainer = run(name, tmp_path)
    move(trainer.student)  # as if it had been trained for long
    before = trained(trainer)
    for key, value in before.items():
        trainer.ema.shadow[key].copy_(value)
    frozen = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    trainer.run()
    after = trained(trainer)
    assert trainer.ema.shadow.keys() == after.keys()
    assert any(not torch.equal(after[key], before[key]) for key in after if "lora_B" in key)
    assert all(torch.equal(value, frozen[key]) for key, value in trainer.teacher.state_dict().items())
    held = holdings(trainer)
    assert held["student"] == held["gradients"] == held["average"] == sum(4 * p.numel() for p in after.values())
    saved = read(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert {key.removeprefix("student.") for key in saved if key.startswith("student.")} == after.keys()
    again = Trainer(trainer.config, CPU, build_parts(trainer.config, CPU))  # from step 2, for the third is redone
    (tmp_path / "run" / "checkpoints" / "step-00000003").rename(tmp_path / "later")
    again.resume()
    assert again.step == 2
    again.run()
    assert all(torch.equal(value, after[key]) for key, value in trained(again).items())
    source, prompts = str(tmp_path / "run"), ["a red panda"]
    latents = open_sampler(source, device="cpu").latents(prompts, steps=1, seed=3)
    export_adapter(source, tmp_path / "adapter", dtype=torch.float32)
    with pytest.raises(UserError, match="an adapter alone"):
        open_origin(str(tmp_path / "adapter"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipeline = adapter_pipeline(open_origin(source))
    few = pipeline.few_steps(1, trainer.config.resolution[0])
    pipe.scheduler = type(few.scheduler).from_pretrained(tmp_path / "adapter", subfolder="scheduler")
    pipe.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    draws_the_same(pipe, pipeline, prompts, latents)
    pipe.unload_lora_weights()
    if name != "flux":  # whose teacher embeds guidance: the biases are that of the student
        stored = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
        pipe.load_lora_weights({key: value for key, value in stored.items() if not key.endswith("bias")})
    with pytest.raises(AssertionError):
        draws_the_same(pipe, pipeline, prompts, latents)
    export(source, tmp_path / "whole", dtype=torch.float32)
    theirs = open_sampler(str(tmp_path / "whole"), device="cpu").latents(prompts, steps=1, seed=3)
    torch.testing.assert_close(theirs, latents, rtol=1e-3, atol=1e-4)


def test_what_has_no_adapter_to_export(tmp_path: Path) -> None:
    """A class that loads none, and a run that trained all weights."""
    run("pixart", tmp_path, steps=1).run()
    with pytest.raises(UserError, match="PixArtSigmaPipeline has no load_lora_weights"):
        export_adapter(str(tmp_path / "run"), tmp_path / "out", dtype=torch.float32)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"student": {}}))
    with pytest.raises(UserError, match=r"trained all weights \(student.lora is null\)"):
        export_adapter(str(tmp_path / "run"), tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()
