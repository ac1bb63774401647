"""The brightness filter: prompts whose end point is close to a black image are dropped (paper Sec. 4.3, App. D)."""

from __future__ import annotations

from torch import Tensor


def keep_mask(xbar0: Tensor, black: Tensor, uniform: Tensor, threshold: float = 1.0) -> Tensor:
    """Which prompts stay, [P] bool.

    mse_b = mean((xbar_0 - z_b)^2) over a sample; below the threshold a prompt is dropped with probability
    1 - mse_b / threshold. `xbar0` [P, C, H, W] and `black` [C, H, W] are scaled latents, `uniform` [P] draws in [0, 1).
    Stays on the device.
    """
    mse = (xbar0 - black).square().mean(dim=(1, 2, 3))
    return uniform * threshold <= mse
