from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from helpers import random_condition
from sana_cases import POINTS, PROMPTS, Batch, backbone_of, every_backbone
from tbcm_kernels.consistency_loss import consistency_loss
from tbcm_kernels.trigflow_step import combined
from torch import Tensor

from tbcm.method.rollout import embedded, guided
from tbcm.method.sampling import consistency_sample, student_times
from tbcm.method.types import Condition
from tbcm.models.sana.network import SanaTrigFlow


def diffusers_F(backbone: SanaTransformer2DModel, batch: Batch, scale: float) -> Tensor:
    """SanaSprintPipeline's arithmetic around diffusers' own forward pass, one text row for every sample."""
    t = batch.t[:, None, None, None]
    s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
    x = batch.u * torch.sqrt(s**2 + (1 - s) ** 2)
    text = {name: tensor.repeat_interleave(POINTS, 0) for name, tensor in batch.condition.tensors.items()}
    config = backbone.config
    v = backbone(
        x,
        encoder_hidden_states=text["embeds"].to(x.dtype),
        encoder_attention_mask=text["mask"],
        guidance=batch.guidance * config.guidance_embeds_scale if config.guidance_embeds else None,
        timestep=s.flatten() * scale,
        return_dict=False,
    )[0]
    return ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * v) / torch.sqrt(s**2 + (1 - s) ** 2)


@every_backbone
@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_F_is_diffusers_own_arithmetic(kind: str, differentiable: bool, scale: float) -> None:
    untouched, batch = backbone_of(kind), Batch()
    net = SanaTrigFlow(deepcopy(untouched), timestep_scale=scale, differentiable=differentiable)
    torch.testing.assert_close(
        batch.predict(net, tangents=False).F, diffusers_F(untouched, batch, scale), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("double_throughout")
@every_backbone
def test_F_is_diffusers_own_arithmetic_in_double_precision(kind: str) -> None:
    untouched, batch = backbone_of(kind).double(), Batch(torch.float64)
    expected = diffusers_F(untouched, batch, 1.0)
    for differentiable in (True, False):
        net = SanaTrigFlow(deepcopy(untouched), timestep_scale=1.0, differentiable=differentiable)
        torch.testing.assert_close(batch.predict(net, tangents=False).F, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["guidance", "patch2"])
def test_rectangular_latents(kind: str) -> None:
    untouched, batch = backbone_of(kind), Batch(size=(4, 8))
    net = SanaTrigFlow(deepcopy(untouched), timestep_scale=1.0)
    torch.testing.assert_close(batch.predict(net).F, diffusers_F(untouched, batch, 1.0), rtol=1e-5, atol=1e-5)


def test_parameter_gradients_are_those_of_diffusers() -> None:
    untouched, batch = backbone_of("guidance"), Batch()
    (diffusers_F(untouched, batch, 1.0) * batch.weight).sum().backward()
    ours = batch.gradients(SanaTrigFlow(deepcopy(untouched), timestep_scale=1.0), tangents=False)
    for name, parameter in untouched.named_parameters():
        torch.testing.assert_close(ours[f"backbone.{name}"], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_those_of_diffusers_pipeline(steps: int) -> None:
    untouched, condition, w = backbone_of("guidance"), random_condition(PROMPTS), 4.5
    pipeline = SanaSprintPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=untouched, scheduler=SCMScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(PROMPTS, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompt=None,
        prompt_embeds=condition.tensors["embeds"],
        prompt_attention_mask=condition.tensors["mask"],
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=w,
        latents=noise,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        use_resolution_binning=False,
    ).images
    net = SanaTrigFlow(deepcopy(untouched), timestep_scale=1.0)
    generator = torch.Generator().manual_seed(1)
    x0 = consistency_sample(
        embedded(net, condition, torch.full((PROMPTS,), w)),
        0.5 * noise,
        student_times(steps, torch.pi / 2),
        0.5,
        lambda: torch.randn(noise.shape, generator=generator),
    )
    torch.testing.assert_close(x0 / 0.5, theirs, rtol=1e-4, atol=1e-4)


def test_padding_of_a_prompt_changes_nothing() -> None:
    net, batch = SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0), Batch()
    before = batch.predict(net, tangents=False).F
    embeds, mask = batch.condition.tensors["embeds"].clone(), batch.condition.tensors["mask"]
    assert not mask.all()
    embeds[~mask] += 7.0
    batch.condition = Condition({"embeds": embeds, "mask": mask})
    assert torch.equal(batch.predict(net, tangents=False).F, before)


def test_every_sample_attends_to_its_own_prompt() -> None:
    net, batch = SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0), Batch()
    before = batch.predict(net, tangents=False).F
    embeds = batch.condition.tensors["embeds"].clone()
    embeds[1] += 1.0
    batch.condition = Condition({**batch.condition.tensors, "embeds": embeds})
    after = batch.predict(net, tangents=False).F
    changed = (after != before).flatten(1).any(1)
    assert changed.tolist() == [False] * POINTS + [True] * POINTS


@pytest.mark.parametrize("kind", ["plain", "guidance"])
@pytest.mark.parametrize("autocast", [False, True])
def test_time_is_never_rounded_to_half_precision(kind: str, autocast: bool) -> None:
    """In bfloat16, tan t is 10 % off at t = 1.5423, the second time of the reference route."""
    backbone, seen = backbone_of(kind), []
    net = SanaTrigFlow(backbone if autocast else backbone.bfloat16(), timestep_scale=1.0)
    embed = backbone.time_embed if kind == "guidance" else backbone.time_embed.emb
    embed.time_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    batch = Batch()
    batch.t = torch.full_like(batch.t, 1.5423)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = batch.predict(net, tangents=False)
    assert answer.F.dtype == torch.float32
    assert seen[0].dtype == torch.float32
    s = seen[0].double()
    torch.testing.assert_close(s / (1 - s), batch.t.double().tan(), rtol=1e-4, atol=0)


def test_a_half_precision_teacher_rounds_its_weights_only() -> None:
    """The change of variables around a bf16 backbone is made in fp32, and its answer is fp32."""
    backbone, batch = backbone_of("guidance"), Batch()
    full = batch.predict(SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0), tangents=False).F
    half = SanaTrigFlow(backbone.bfloat16(), timestep_scale=1.0, differentiable=False)
    F = batch.predict(half, tangents=False).F
    assert F.dtype == torch.float32
    assert (F - full).norm() < 0.05 * full.norm()


def test_a_query_without_positive_features_stays_finite_in_fp16() -> None:
    """Linear attention divides by sum_k relu(q) relu(k) + 1e-15; in fp16 that guard would be 0."""
    net, batch = SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0), Batch()
    for block in net.backbone.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.norm_q.weight)
    with torch.autocast("cpu", torch.float16):
        answer = batch.predict(net)
    answer.F.sum().backward()
    assert answer.F.isfinite().all()
    assert answer.dF.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.backbone.parameters())


def test_the_log_variance_starts_at_zero_and_learns() -> None:
    net, batch = SanaTrigFlow(backbone_of("guidance"), timestep_scale=1.0, logvar=True), Batch()
    answer = batch.predict(net)
    assert answer.logvar.shape == batch.t.shape
    assert (answer.logvar == 0).all()
    keep = torch.ones(PROMPTS * POINTS, dtype=torch.bool)
    consistency_loss(answer.F, batch.du, answer.logvar, batch.t, keep, len(keep), 0.5)[0].backward()
    assert net.logvar_head.weight.grad.any()
    assert net.logvar_head.bias.grad.any()
    assert SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0).logvar_head is None


def test_the_log_variance_knows_time_and_guidance() -> None:
    net, batch = SanaTrigFlow(backbone_of("guidance"), timestep_scale=1.0, logvar=True), Batch()
    torch.nn.init.normal_(net.logvar_head.weight, generator=torch.Generator().manual_seed(0))
    here = batch.predict(net, tangents=False).logvar
    batch.guidance = batch.guidance + 1
    elsewhere = batch.predict(net, tangents=False).logvar
    assert (here != elsewhere).all()
    batch.t = batch.t * 0.5
    assert (batch.predict(net, tangents=False).logvar != elsewhere).all()


def test_guidance_runs_both_branches_in_one_batch() -> None:
    net, batch = SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0, differentiable=False), Batch()
    u, t, null = batch.u[:PROMPTS], batch.t[:PROMPTS], random_condition(PROMPTS, seed=5)
    w = torch.tensor([4.0, 5.0])
    cond, uncond = net(u, t, batch.condition).F, net(u, t, null).F
    expected = uncond + w[:, None, None, None] * (cond - uncond)
    torch.testing.assert_close(combined(guided(net, batch.condition, null)(u, t), w), expected, rtol=1e-4, atol=1e-4)


def test_samples_that_cannot_be_shared_out_over_the_prompts_are_refused() -> None:
    net, batch = SanaTrigFlow(backbone_of("plain"), timestep_scale=1.0), Batch()
    with pytest.raises(ValueError, match="5 samples cannot be shared out evenly over 2 prompts"):
        net(batch.u[:5], batch.t[:5], batch.condition)


def test_a_network_that_embeds_guidance_asks_for_it() -> None:
    net, batch = SanaTrigFlow(backbone_of("guidance"), timestep_scale=1.0), Batch()
    with pytest.raises(ValueError, match="guidance"):
        net(batch.u, batch.t, batch.condition)
