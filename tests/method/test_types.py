from __future__ import annotations

import torch
from helpers import random_condition

from tbcm.method.types import Condition, Trajectory


def test_conditions_are_sliced_joined_and_repeated_by_prompt() -> None:
    condition = random_condition(4)
    assert len(condition) == 4
    parts = Condition.cat(condition[:1], condition[1:])
    assert all(torch.equal(parts.tensors[k], v) for k, v in condition.tensors.items())
    repeated = condition[2:3].expand(3)
    assert len(repeated) == 3
    assert torch.equal(repeated.tensors["embeds"], condition.tensors["embeds"][[2, 2, 2]])


def test_points_of_a_trajectory_select_route_points_not_prompts() -> None:
    x = torch.arange(2 * 3).float().view(2, 3, 1, 1, 1)
    trajectory = Trajectory(x, -x, x[:, :, 0, 0, 0], x[:, 0], torch.ones(2))
    rest = trajectory.points(slice(1, None))
    assert rest.x.flatten().tolist() == [1, 2, 4, 5]
    assert torch.equal(rest.dxdt, -rest.x)
    assert rest.t.tolist() == [[1, 2], [4, 5]]
    assert torch.equal(rest.x0, trajectory.x0)
