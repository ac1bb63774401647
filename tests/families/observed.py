"""What a pipeline itself does: each sampling step's state, combined answer and next state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbcm.method.formulation import Diffusion, Flow, Formulation


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: `answer` is the network's, guidance included; `sigmas` before and after it, where the
    scheduler has any; `index` its time."""

    sample: Tensor
    answer: Tensor
    after: Tensor
    index: float
    sigmas: tuple[float, float] | None


def observe(pipe: Any, arguments: dict[str, Any]) -> list[Step]:
    """Runs the whole pipeline."""
    steps: list[Step] = []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    def spy(answer: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = step(answer, t, sample, *args, **kwargs)
        after = out[0] if isinstance(out, tuple) else out.prev_sample
        i = getattr(scheduler, "step_index", None)
        known = i is not None and hasattr(scheduler, "sigmas")
        sigmas = (float(scheduler.sigmas[i - 1]), float(scheduler.sigmas[i])) if known else None
        steps.append(Step(sample, answer, after, float(t), sigmas))
        return out

    scheduler.step = spy
    try:
        pipe(**arguments)
    finally:
        scheduler.step = step
    return steps


def places(formulation: Formulation, step: Step, scheduler: Any) -> tuple[float, float, float, float]:
    """(t, scale) before and after a step: a pipeline's sample is u times the scale, a function of the sigmas alone."""

    def place(sigma: float) -> tuple[float, float]:
        s = torch.tensor(sigma, dtype=torch.float64)
        if isinstance(formulation, Flow):
            return float(torch.atan2(s, 1 - s)), float(torch.sqrt(s**2 + (1 - s) ** 2))
        unit = getattr(formulation, "sigma_data", 1.0)  # EDM's samples are at the data's own scale
        t = torch.atan(s / unit)
        return float(t), float(unit / torch.cos(t))

    if step.sigmas is not None:
        return *place(step.sigmas[0]), *place(step.sigmas[1])
    assert isinstance(formulation, Diffusion)
    before = int(step.index)
    after = before - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = scheduler.final_alpha_cumprod.double()
    t_after = formulation.knot(after) if after >= 0 else float(torch.atan2((1 - last).sqrt(), last.sqrt()))
    return formulation.knot(before), 1.0, t_after, 1.0
