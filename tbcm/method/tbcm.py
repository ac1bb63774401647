"""TBCM's objective: the consistency loss on points of the teacher's own generation trajectories (paper Algorithm 1)."""

from __future__ import annotations

import math

from tbcm_kernels.consistency_loss import consistency_loss
from tbcm_kernels.tangent import tangent
from torch import Tensor

from tbcm.method.consistency import logvar_prior, network_tangents
from tbcm.method.types import Condition, Network, Trajectory


def first_training_point(t_max: float) -> int:
    """The first point does not train where t_max = pi/2, since w(pi/2) = 0."""
    return 1 if math.isclose(t_max, math.pi / 2, abs_tol=1e-6) else 0


def tbcm_loss(
    student: Network,
    trajectory: Trajectory,
    condition: Condition,
    keep: Tensor,
    *,
    count: int,
    r: float,
    sigma_data: float,
    c: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over all points of `trajectory` (P prompts, N points), and per-sample figures [B = P N], on the device.

    `keep` [P] bool: the brightness filter; `count`: samples of the whole step (see `consistency_loss`).
    """
    n = trajectory.t.shape[1]
    x, dxdt, t = trajectory.x.flatten(0, 1), trajectory.dxdt.flatten(0, 1), trajectory.t.flatten()
    keep, guidance = keep.repeat_interleave(n), trajectory.guidance.repeat_interleave(n)
    answer = student(x / sigma_data, t, condition, guidance, network_tangents(dxdt, t, sigma_data))
    assert answer.dF is not None and answer.logvar is not None
    g, norm = tangent(answer.F.detach(), answer.dF, x, dxdt, t, r, sigma_data, c)
    logvar = answer.logvar + logvar_prior(t, answer.F[0].numel(), sigma_data)
    loss, error = consistency_loss(answer.F, g, logvar, t, keep, count, sigma_data)
    return loss, {"t": t, "keep": keep, "error": error, "g_norm": norm, "logvar": logvar.detach()}
