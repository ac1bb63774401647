from __future__ import annotations

import pytest
import torch
from helpers import random_condition, tiny_sana
from torch import Tensor

from tbcm.models.discriminator import DiscriminatorHeads, spread_layers
from tbcm.models.loading import freeze
from tbcm.models.sana.network import SanaTrigFlow

SIZE = 2, 3


def heads(dim: int = 8, layers: int = 2) -> DiscriminatorHeads:
    torch.manual_seed(0)
    return DiscriminatorHeads(dim, layers)


def tokens(batch: int = 2, dim: int = 8, layers: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, SIZE[0] * SIZE[1], dim) for _ in range(layers)]


def weights(net: DiscriminatorHeads) -> list[Tensor]:
    return [layer.weight.flatten(1) for head in net.heads for layer in (head.expand, head.mix, head.score)]


def test_layers_are_spread_over_the_depth() -> None:
    assert spread_layers(28) == [2, 8, 14, 19, 25]
    assert spread_layers(3) == [0, 1, 2]


def test_a_score_for_each_token_of_each_layer_whatever_the_scale_of_its_features() -> None:
    net, features = heads(), tokens()
    scores = net(features, SIZE)
    assert scores.shape == (2, 12) and scores.dtype == torch.float32
    torch.testing.assert_close(net([1e4 * x.double() for x in features], SIZE), scores, rtol=1e-3, atol=1e-4)


def test_renewed_weights_have_singular_value_one_and_calls_change_nothing() -> None:
    net = heads()
    for _ in range(60):
        net.renew()
    for weight in weights(net):
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=2e-3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(tokens(), SIZE)
    assert not net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_gradients_to_features_and_weights_are_those_of_finite_differences() -> None:
    head = heads(4, 1).double().heads[0]
    names = [name for name, parameter in head.named_parameters() if parameter.numel() < 300]  # not 3 x 3 x 256 x 256
    values = tuple(dict(head.named_parameters())[name].detach()[:].clone().requires_grad_() for name in names)
    x = tokens(1, 4, 1)[0].double().requires_grad_()

    def scores(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (x, SIZE))

    assert len(names) >= 3
    assert torch.autograd.gradcheck(scores, (x, *values), fast_mode=True)


def frozen(checkpointing: str = "none") -> SanaTrigFlow:
    net = SanaTrigFlow(tiny_sana(), timestep_scale=1.0, differentiable=False, checkpointing=checkpointing)  # type: ignore[arg-type]
    freeze(net)
    return net


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor([0.4, 1.2])


def test_features_are_what_the_blocks_of_the_network_return() -> None:
    net, (u, t), condition = frozen(), inputs(), random_condition(2)
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *a: seen.append(a[2][0])) for b in net.backbone.transformer_blocks]
    net(u, t, condition)
    whole, ran = list(seen), len(seen)
    features = net.features(u, t, condition, None, [0])
    assert len(seen) == ran + 1, "blocks after the last one asked for are not run"
    torch.testing.assert_close(features[0], whole[0])
    torch.testing.assert_close(net.features(u, t, condition, None, [0, 1]), whole[:2])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_features_have_the_gradient_to_the_input_that_finite_differences_have(checkpointing: str) -> None:
    net, (u, t), condition = frozen(checkpointing), inputs(), random_condition(2)
    torch.manual_seed(4)
    direction = torch.randn_like(u)

    def value(u: Tensor) -> Tensor:
        return sum(x.square().mean() for x in net.features(u, t, condition, None, [0, 1]))  # type: ignore[return-value]

    u.requires_grad_()
    (gradient,) = torch.autograd.grad(value(u), u)
    step = 1e-2
    with torch.no_grad():
        slope = (value(u + step * direction) - value(u - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=5e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in net.parameters())
