"""Each rule against `torch.func.jvp` of the plain layer, in fp64; and what the rules cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from sana_cases import POINTS, PROMPTS, Batch, backbone_of
from tbcm_kernels.catalog import Dual
from tbcm_kernels.cross_attention import cross_attention
from tbcm_kernels.gated_residual import gated_residual, residual_norm_modulate
from tbcm_kernels.linear_attention import linear_attention
from tbcm_kernels.norm_modulate import norm_modulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tbcm.config.section import Derivative
from tbcm.method.types import Condition
from tbcm.models.differentiation import dual as rules
from tbcm.models.sana.block import mix_ffn
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.presets import SANA
from tbcm.training.accounting import CostCounter


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = randn(50 + i, *parameter.shape)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "SiLU": (nn.SiLU, (3, 7)),
    "dropout of 0": (lambda: nn.Dropout(0.0), (3, 7)),
    "RMS norm": (lambda: RMSNorm(6, eps=1e-2), (2, 3, 6)),
    "RMS norm without weight": (lambda: RMSNorm(6, eps=1e-5, elementwise_affine=False), (2, 3, 6)),
}


@pytest.mark.usefixtures("double_throughout")
@pytest.mark.parametrize("name", LAYERS)
def test_a_rule_is_the_derivative_of_its_layer(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x, dx = randomised(make()), randn(0, *shape).requires_grad_(), randn(1, *shape)
    y, dy = rules.dual(layer, (x, dx))
    expected = torch.func.jvp(layer, (x.detach(),), (dx,))
    torch.testing.assert_close((y, dy), expected, rtol=1e-12, atol=1e-12)
    assert y.requires_grad
    assert not dy.requires_grad
    assert rules.dual(layer, (x, None))[1] is None


def along(fn: Callable[..., Dual], *pairs: Dual) -> None:
    """fn on duals equals torch.func.jvp of fn on values; the value keeps its graph, the tangent has none."""
    values, tangents = zip(*pairs, strict=True)
    y, dy = fn(*((value.clone().requires_grad_(), tangent) for value, tangent in pairs))
    expected = torch.func.jvp(lambda *v: fn(*((value, None) for value in v))[0], values, tangents)
    torch.testing.assert_close((y, dy), expected, rtol=1e-11, atol=1e-11)
    assert y.requires_grad
    assert not dy.requires_grad


def pair(seed: int, *shape: int) -> Dual:
    return randn(seed, *shape), randn(seed + 100, *shape)


def test_operators_of_several_duals() -> None:
    """The references; the kernels are compared with them in tests/kernels."""
    h, x, gate, shift, scale = (pair(i, 2, 3 if i < 2 else 1, 4) for i in range(5))
    along(lambda x, shift, scale: norm_modulate(x, shift, scale, 1e-2, torch.float64), x, shift, scale)
    along(gated_residual, h, gate, x)
    for i in range(2):
        along(lambda *d, i=i: residual_norm_modulate(*d, 1e-2, torch.float64)[i], h, x, gate, shift, scale)
        along(lambda h, x, *d, i=i: residual_norm_modulate(h, x, None, *d, 1e-2, torch.float64)[i], h, x, shift, scale)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_side_by_side(bias: bool) -> None:
    """In one product, or joined: results, tangents and all gradients are those of the layers by themselves."""
    layers = [nn.Linear(4, width, bias=bias, dtype=torch.float64) for width in (3, 5)]
    value, tangent = pair(0, 2, 4)
    leaves = [value.requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    y, dy = rules.side_by_side(layers, (value, tangent))
    expected = [rules.dual(layer, (value, tangent)) for layer in layers]
    wanted = torch.cat([y for y, _ in expected], -1)
    torch.testing.assert_close((y, dy), (wanted, torch.cat([dy for _, dy in expected], -1)))
    assert not dy.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (y, wanted)))


@pytest.mark.parametrize("normed", [True, False])
def test_linear_attention(normed: bool) -> None:
    norms = (randn(7, 6), randn(8, 6)) if normed else (None, None)

    def attend(qkv: Dual) -> Dual:
        return linear_attention(qkv, *norms, 1e-2, 2, torch.float64)

    along(attend, pair(0, 2, 5, 18))


def test_linear_attention_is_the_weighted_mean_of_the_values() -> None:
    """sum_k relu(q) . relu(k) v / sum_k relu(q) . relu(k), written as quadratic attention."""
    q, k, v = (randn(i, 2, 5, 6) for i in range(3))
    q[0, 0] = -1.0  # no positive feature: 0 over the guard
    out, _ = linear_attention((torch.cat([q, k, v], -1), None), None, None, 0.0, 2, torch.float64)
    heads = [x.unflatten(-1, (2, 3)) for x in (q.relu(), k.relu(), v)]
    weights = torch.einsum("bqhd,bkhd->bhqk", heads[0], heads[1])
    expected = torch.einsum("bhqk,bkhd->bqhd", weights / (weights.sum(-1, keepdim=True) + 1e-15), heads[2])
    torch.testing.assert_close(out, expected.flatten(-2), rtol=1e-12, atol=1e-12)
    assert (out[0, 0] == 0).all()


@pytest.mark.parametrize("points", [1, 3])
def test_cross_attention(points: int) -> None:
    key, value = randn(5, 2, 4, 6), randn(6, 2, 4, 6)
    bias = torch.where(torch.arange(4) < torch.tensor([[4], [2]]), 0.0, -10000.0)[:, None]

    def attend(q: Dual) -> Dual:
        return cross_attention(q, key, value, bias, 2, explicit=True)

    query = pair(0, 2 * points, 5, 6)
    along(attend, query)
    fused, _ = cross_attention((query[0], None), key, value, bias, 2, explicit=False)
    torch.testing.assert_close(fused, attend(query)[0], rtol=1e-11, atol=1e-11)


def test_mix_ffn_is_diffusers_own() -> None:
    ff = randomised(GLUMBConv(4, 4, 2.5, residual_connection=False))
    x = pair(0, 2, 15, 4)
    along(lambda x: mix_ffn(ff, x, (3, 5)), x)
    image = x[0].unflatten(1, (3, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(mix_ffn(ff, (x[0], None), (3, 5))[0], ff(image).flatten(2).mT, rtol=1e-12, atol=1e-12)


def test_a_layer_without_a_rule_is_refused_by_name() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match=r"type Tanh.*student.derivative=jvp"):
        rules.dual(nn.Tanh(), (x, x))
    assert rules.dual(nn.Tanh(), (x, None))[1] is None
    with pytest.raises(TypeError, match="1 x 1"):
        rules.pointwise(nn.Conv2d(4, 4, 3), (x, x))
    with pytest.raises(ValueError, match=r"dropout of 0.5"):
        rules.dual(nn.Dropout(0.5), (x, x))


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions by operator and output shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.counts[PRODUCTS[func], tuple(out.shape)] += 1
        return out


aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: "linear",
    aten.addmm.default: "linear",
    aten.bmm.default: "bmm",
    aten.convolution.default: "convolution",
}


def products(**options: str) -> dict[bool, Counter[tuple[Any, ...]]]:
    net, batch, found = SanaTrigFlow(backbone_of("guidance", num_layers=1), timestep_scale=1.0, **options), Batch(), {}
    for tangents in (False, True):
        with Products() as counter:
            batch.predict(net, tangents)
        found[tangents] = counter.counts
    return found


def test_products_of_a_pass_with_its_tangent() -> None:
    """Linear layers and convolutions of activations twice; text once; linear attention's products of two duals three
    times, cross-attention's, whose other operand is the text's constant, twice."""
    found = products()
    samples, width, text = PROMPTS * POINTS, 16, PROMPTS * 5
    plain, both = found[False], found[True]
    assert plain.keys() == both.keys()
    for key in plain:
        kind, shape = key
        if kind == "bmm":
            linear_attention = shape[0] == samples * 2
            assert both[key] == plain[key] * (3 if linear_attention else 2), key
        elif kind == "linear" and shape[0] == text:
            assert both[key] == plain[key], key  # caption projection, keys and values
        elif kind == "linear" and shape == (samples, width):
            assert (plain[key], both[key]) == (4, 6), key  # time embedding twice, guidance embedding once
        else:
            assert both[key] == plain[key] * 2, key


def test_torch_func_jvp_does_more() -> None:
    """What the rules spare: a third product, with the weight's zero tangent, for every layer."""
    dual, jvp = (products(derivative=derivative)[True] for derivative in ("dual", "jvp"))
    assert sum(jvp.values()) > 1.3 * sum(dual.values())


def test_a_pass_with_its_tangent_is_less_than_two_forwards_of_the_published_network() -> None:
    """FLOPs of Sana-0.6B at 1024 px with 300 text tokens, 15 points of a prompt; a published forward projects the text
    for each of them."""
    with FakeTensorMode():
        condition = Condition({"embeds": torch.randn(1, 300, 2304), "mask": torch.ones(1, 300, dtype=torch.bool)})
        u, t, w = torch.randn(15, 32, 32, 32), torch.rand(15), torch.full((15,), 4.5)

        def flops(text_once: bool, tangents: tuple[Tensor, Tensor] | None, derivative: Derivative = "dual") -> int:
            """Of all blocks, which cost the same: of one, and of as many others as there are."""
            counts = []
            for layers in (1, 2):
                backbone = SanaTransformer2DModel(**SANA["sana-600m"] | {"num_layers": layers}, guidance_embeds=True)
                net = SanaTrigFlow(backbone, timestep_scale=1.0, derivative=derivative, text_once=text_once)
                with CostCounter() as counter, torch.no_grad():
                    net(u, t, condition, w, tangents)
                counts.append(counter.flops)
            one, two = counts
            return one + (SANA["sana-600m"]["num_layers"] - 1) * (two - one)

        published, repeated, once = flops(False, None), flops(False, (u, t)), flops(True, (u, t))
        jvp = flops(False, (u, t), "jvp")
    assert published == pytest.approx(15 * 1.1215e12, rel=0.001)
    assert 1.94 < repeated / published < 1.97
    assert 1.90 < once / published < 1.93
    assert 2.90 < jvp / published < 2.94
