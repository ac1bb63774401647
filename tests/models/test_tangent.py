from __future__ import annotations

import torch
from torch import Tensor, nn

from tbcm.models.tangent import push, push_checkpointed


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


class Part(nn.Module):
    """Reads an input, a modulation and a text, as a transformer block does, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4)).double()
        self.runs = 0

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        self.runs += 1
        return x + modulation * self.layers(x * text)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, 5, 4).requires_grad_(), randn(1, 5, 4).requires_grad_(), randn(2, 1, 4).requires_grad_()


def test_checkpointed_values_derivatives_and_gradients_are_the_plain_ones() -> None:
    part, dx, dm = Part(), randn(3, 5, 4), randn(4, 5, 4)
    results = []
    for checkpointed in (False, True):
        part.zero_grad()
        x, modulation, text = inputs()
        if checkpointed:
            value, derivative = push_checkpointed(part, (x, dx), (modulation, dm), text, list(part.parameters()))
        else:
            ((value, derivative),) = push(lambda x, m, text=text: part(x, m, text), (x, dx), (modulation, dm))
        assert not derivative.requires_grad
        (value * randn(5, 5, 4)).sum().backward()
        results.append([value, derivative, x.grad, modulation.grad, text.grad, *(p.grad for p in part.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_checkpointing_keeps_its_inputs_only_and_recomputes_once() -> None:
    part, (x, modulation, text) = Part(), inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value, _ = push_checkpointed(
            part, (x, torch.ones_like(x)), (modulation, modulation), text, list(part.parameters())
        )
    given = {tensor.data_ptr() for tensor in (x, modulation, text, *part.parameters())}
    assert {tensor.data_ptr() for tensor in kept} <= given
    assert part.runs == 1
    value.sum().backward()
    assert part.runs == 2


def test_a_checkpointed_value_without_a_tangent() -> None:
    part, (x, modulation, text) = Part(), inputs()
    value, derivative = push_checkpointed(part, (x, None), (modulation, None), text, list(part.parameters()))
    assert derivative is None
    torch.testing.assert_close(value, part(x, modulation, text))
    value.sum().backward()
    expected = torch.autograd.grad(part(x, modulation, text).sum(), [x, modulation, text])
    torch.testing.assert_close([x.grad, modulation.grad, text.grad], list(expected))


def test_recomputation_runs_under_the_autocast_of_the_forward_pass() -> None:
    layer, seen = nn.Linear(4, 4), []

    def part(x: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        out = layer(x * text)
        seen.append(out.dtype)
        return x + modulation * out

    x, modulation, text = (tensor.detach().float().requires_grad_() for tensor in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = push_checkpointed(part, (x, x.detach()), (modulation, x.detach()), text, list(layer.parameters()))
    value.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
