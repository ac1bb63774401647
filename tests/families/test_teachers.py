"""Every family as a teacher, against its own unmodified pipeline in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families.observed import observe, places
from families.tiny import BUILDERS, Tiny, make

from tbcm.models.families.codec import Pixels, codec_of
from tbcm.models.families.family import Facts
from tbcm.models.families.rows import family_of
from tbcm.models.network import DiffusersNetwork

W = 4.0


def network(tiny: Tiny) -> tuple[DiffusersNetwork, tuple[int, ...]]:
    """With the shape of its codec's latents."""
    pipe, family = tiny.pipe, family_of(type(tiny.pipe).__name__)
    backbone, vae = getattr(pipe, family.network), getattr(pipe, "vae", None)
    frames, side = tiny.size.get("num_frames", 1), backbone.config.get("sample_size")
    formulation = family.formulation(Facts(backbone.config, pipe.scheduler))
    unit = getattr(formulation, "sigma_data", 1.0)
    codec = codec_of(type(vae).__name__, vae.config, unit, frames) if vae else Pixels(backbone.config)
    if not tiny.size:  # a network of one size, counted in latents
        size = (side * codec.compression,) * 2
    else:
        size = tiny.size["height"], tiny.size["width"]
    shape = codec.shape(*size)
    return DiffusersNetwork(backbone, family, formulation, shape[:-2]), shape


def wide(tiny: Tiny) -> Tiny:
    """The same, for images twice as wide as they are high."""
    return replace(tiny, size={**tiny.size, "width": 2 * tiny.size["height"]})


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_velocity_and_step_are_the_pipelines_own(name: str, shape: str) -> None:
    tiny = make(name, torch.float64)
    if shape == "wide":
        if not tiny.size:
            pytest.skip("its pipeline makes images of one size")
        tiny = wide(tiny)
    pipe, family = tiny.pipe, family_of(type(tiny.pipe).__name__)
    prompts = tiny.prompts[:1] if family.ragged else tiny.prompts  # of which a pipeline pads some to the longest
    count = len(prompts)
    net, latents = network(tiny)
    condition, null = family.encode(pipe, prompts, **tiny.size)
    torch.manual_seed(0)
    arguments = {**family.prompts(prompts), **family.guided(count), **tiny.size}
    steps = observe(pipe, {**arguments, "num_inference_steps": 3, "output_type": "np"})
    formulation = net.formulation
    for step in steps:
        t, scale, t_after, scale_after = places(formulation, step, pipe.scheduler)
        u = family.layout.unpack(step.sample[:count], latents) / scale
        times = torch.full((count,), t, dtype=torch.float64)
        w = torch.full((count,), W, dtype=torch.float64)
        if null is None:
            F = net(u, times, condition, w).F
        else:
            F = net.guided(condition, null, w)(u, times)
        answer = family.layout.unpack(step.answer[:count], latents)
        own = formulation.native(u, times, F) * getattr(formulation, "sign", 1)  # what a scheduler expects of any
        torch.testing.assert_close(own.to(answer.dtype), answer, rtol=0, atol=tolerance(answer, 1e-6))
        after = family.layout.unpack(step.after[:count], latents)
        turned = (math.cos(t - t_after) * u - math.sin(t - t_after) * F) * scale_after
        torch.testing.assert_close(turned.to(after.dtype), after, rtol=0, atol=tolerance(after, 3e-6))


def tolerance(x: torch.Tensor, double: float) -> float:
    return float(x.abs().max()) * (double if x.dtype == torch.float64 else 5e-6)
