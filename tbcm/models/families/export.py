"""How plain diffusers runs a student of each family: a stock scheduler, and the arguments of the pipeline's call.

Consistency sampling maps to the clean latent and noises it afresh to the next time. Two schedulers of diffusers do just
that: `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling`, and `LCMScheduler` whose boundary condition a huge
`timestep_scaling` turns off. What differs between pipelines is how their call is told the times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tbcm.errors import UserError
from tbcm.method.formulation import Diffusion, Flow, Formulation
from tbcm.method.trigflow import flow_time, time_from_flow
from tbcm.models.families.family import Family

_BETAS = "beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "prediction_type"


@dataclass(frozen=True)
class FewSteps:
    """`arguments` of the pipeline's call, with `scheduler` in it; `times` in radians are those at which its network is
    then called."""

    scheduler: Any
    arguments: dict[str, Any]
    times: list[float]


def few_steps(family: Family, formulation: Formulation, scheduler: Any, steps: int) -> FewSteps:
    """How a pipeline with the teacher's `scheduler` becomes a student's of so many steps.

    Raises:
        UserError: EDM: no scheduler of diffusers does consistency sampling in its coordinates.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    count = {"num_inference_steps": steps, **family.unguided}
    if isinstance(formulation, Diffusion):
        lcm = _lcm_scheduler(formulation, scheduler)
        indices = [(len(formulation) * (steps - i)) // steps - 1 for i in range(steps)]
        if family.times == "grid":
            lcm.set_timesteps(steps, original_inference_steps=len(formulation))
            indices = lcm.timesteps.tolist()
        else:
            count["timesteps"] = indices
        return FewSteps(lcm, count, [formulation.knot(i) for i in indices])
    if not isinstance(formulation, Flow):
        raise UserError(
            f"{family.pipeline} with EDM's preconditioning: no scheduler of diffusers does consistency sampling for it;"
            " tbcm.sample runs this student, but it cannot be exported"
        )
    sigmas = flow_time(torch.tensor(evenly(steps), dtype=torch.float64))
    if family.times == "timesteps":  # integers of the time before the shift
        unshifted = sigmas / (formulation.shift - (formulation.shift - 1) * sigmas)
        indices = (formulation.scale * unshifted).round().long().tolist()
        q = torch.tensor(indices, dtype=torch.float64) / formulation.scale
        sigmas = formulation.shift * q / (1 + (formulation.shift - 1) * q)
        same = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=True)
        return FewSteps(same, {**count, "timesteps": indices}, time_from_flow(sigmas).tolist())
    options: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": True}
    if family.times == "terminal":  # no argument for them: an even grid of sigmas that ends where it is told
        if steps > 1:
            options["shift_terminal"] = float(sigmas[-1])
            sigmas = torch.linspace(1, float(sigmas[-1]), steps, dtype=torch.float64)
    else:
        count["sigmas"] = sigmas.tolist()
    return FewSteps(FlowMatchEulerDiscreteScheduler(**options), count, time_from_flow(sigmas).tolist())


def _lcm_scheduler(formulation: Diffusion, scheduler: Any) -> Any:
    """With the table of the teacher's `scheduler`.

    Its betas are given: LCMScheduler's defaults are not those of the scheduler that the configuration was saved by.
    Where they do not make the same table (schedulers rescale, shift or clip theirs, each by settings of its own), the
    betas that do are written out.
    """
    from diffusers import LCMScheduler

    options = {"clip_sample": False, "timestep_scaling": 1e9, "original_inference_steps": len(formulation)}
    betas = {key: scheduler.config[key] for key in _BETAS if key in scheduler.config}
    lcm, table = LCMScheduler(**betas, **options), formulation.alphas_cumprod
    if torch.allclose(lcm.alphas_cumprod.double(), table, rtol=1e-4, atol=1e-9):
        return lcm
    written = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    prediction = {key: betas[key] for key in ("prediction_type",) if key in betas}
    return LCMScheduler(trained_betas=written.tolist(), num_train_timesteps=len(formulation), **prediction, **options)


def evenly(steps: int) -> list[float]:
    """[pi/2], [pi/2, 1.3] as Sana-Sprint has it, or an even grid from pi/2 towards 0."""
    if steps == 2:
        return [math.pi / 2, 1.3]
    return [math.pi / 2 * (1 - i / steps) for i in range(steps)]
