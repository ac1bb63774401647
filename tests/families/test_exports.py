"""A student in few steps, and the unmodified pipeline with a stock scheduler: the same latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families.observed import observe
from families.test_teachers import W, network, tolerance
from families.tiny import BUILDERS, make
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tbcm.errors import UserError
from tbcm.method.formulation import Flow
from tbcm.models.families.export import few_steps


class Draws(TorchFunctionMode):
    """Notes what the pipeline draws after its first noise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            self.found.append(out)
        return out


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_plain_diffusers_samples_as_this_package_does(name: str, steps: int) -> None:
    tiny = make(name, torch.float64)
    net, latents = network(tiny)
    pipe, family, formulation = tiny.pipe, net.family, net.formulation.at(16)  # tokens of CogView4
    if name == "edm":
        with pytest.raises(UserError, match="cannot be exported"):
            few_steps(family, formulation, pipe.scheduler, steps)
        return
    prompts = tiny.prompts[:1] if family.ragged else tiny.prompts
    condition, _ = family.encode(pipe, prompts, **tiny.size)
    few = few_steps(family, formulation, pipe.scheduler, steps)
    pipe.scheduler = few.scheduler
    guidance = {"guidance_scale": W} if family.guidance else {}
    with Draws() as draws:
        seen = observe(pipe, {**family.prompts(prompts), **tiny.size, **few.arguments, **guidance, "output_type": "np"})
    assert len(seen) == steps == len(few.times)
    u = family.layout.unpack(seen[0].sample, latents).double()
    rest = (family.layout.unpack(z, latents).double() for z in draws.found[1:])
    w = torch.full((len(prompts),), W, dtype=u.dtype)
    flow = isinstance(formulation, Flow)
    for step, (t, state) in enumerate(zip(few.times, seen, strict=True)):
        scale = math.hypot(s := math.sin(t) / (math.sin(t) + math.cos(t)), 1 - s) if flow else 1.0
        given = family.layout.unpack(state.sample, latents)
        torch.testing.assert_close((u * scale).to(given.dtype), given, rtol=0, atol=tolerance(given, 2e-5))
        times = torch.full((len(prompts),), t, dtype=torch.float64)
        with torch.no_grad():
            F = net(u, times, condition, w).F
        x0 = math.cos(t) * u - math.sin(t) * F
        if step + 1 < steps:
            after = few.times[step + 1]
            u = math.cos(after) * x0 + math.sin(after) * next(rest)
    last = family.layout.unpack(seen[-1].after, latents)
    torch.testing.assert_close(x0.to(last.dtype), last, rtol=0, atol=tolerance(last, 2e-5))
