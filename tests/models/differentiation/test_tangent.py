from __future__ import annotations

import torch
from torch import Tensor, nn

from tbcm.models.differentiation.tangent import push


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_value_and_its_directional_derivative() -> None:
    x, y, dx, dy = (randn(i, 3, 4) for i in range(4))
    ((value, derivative),) = push(lambda x, y: x.sin() * y.square(), (x, dx), (y, dy))
    torch.testing.assert_close(value, x.sin() * y**2)
    torch.testing.assert_close(derivative, x.cos() * dx * y**2 + 2 * x.sin() * y * dy)


def test_several_outputs_each_with_its_own_derivative() -> None:
    x, dx = randn(0, 5), randn(1, 5)
    (double, d_double), (cube, d_cube) = push(lambda x: (2 * x, x**3), (x, dx))
    torch.testing.assert_close((double, d_double), (2 * x, 2 * dx))
    torch.testing.assert_close((cube, d_cube), (x**3, 3 * x**2 * dx))


def test_the_value_keeps_its_graph_and_the_derivative_has_none() -> None:
    layer = nn.Linear(4, 4).double()
    x, dx = randn(0, 2, 4).requires_grad_(), randn(1, 2, 4)
    ((value, derivative),) = push(lambda x: layer(x).tanh(), (x, dx))
    assert value.requires_grad
    assert not derivative.requires_grad
    value.sum().backward()
    got = [x.grad, layer.weight.grad, layer.bias.grad]
    expected = torch.autograd.grad(layer(x).tanh().sum(), [x, layer.weight, layer.bias])
    torch.testing.assert_close(got, list(expected))


def test_parts_pushed_one_after_the_other_are_the_chain_rule() -> None:
    first, second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    x, dx = randn(0, 2, 4), randn(1, 2, 4)
    ((_, in_parts),) = push(lambda h: second(h).sin(), push(lambda x: first(x).tanh(), (x, dx))[0])
    _, at_once = torch.func.jvp(lambda x: second(first(x).tanh()).sin(), (x,), (dx,))
    torch.testing.assert_close(in_parts, at_once)


def test_nothing_is_differentiated_without_a_tangent() -> None:
    x = randn(0, 3)
    assert push(lambda x: x.square(), (x, None))[0][1] is None
    outputs = push(lambda x, y: (x * y, x), (x, x), (x, None))
    assert [derivative for _, derivative in outputs] == [None, None]
