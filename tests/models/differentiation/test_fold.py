"""The compiler pass that removes products with zero tangents: counts from the product rule, values from eager."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from tbcm.models.differentiation.fold import fold_options, fold_zero_operands

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on the CPU"
)
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution)


def products(graph: Graph) -> int:
    return sum(getattr(node.target, "overloadpacket", None) in PRODUCTS for node in graph.nodes)


def operators(graph: Graph) -> list[object]:
    return [getattr(node.target, "overloadpacket", None) for node in graph.nodes if node.op == "call_function"]


def trace(fn: Callable[..., object], *inputs: Tensor) -> GraphModule:
    return make_fx(fn, tracing_mode="fake")(*inputs)


def derivative(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def run(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        y, dy = torch.func.jvp(fn, (x,), (dx,))
        return y, dy.detach()

    return run


class Net(nn.Module):
    """Every kind of product of a Sana block, with the tokens [2, 16, 8] both as a sequence and as an image."""

    # linear, query, two convolutions, two products with the text: 2 each. Two products of the text: 1. Of two duals: 3.
    IDEAL = 6 * 2 + 2 * 1 + 2 * 3

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.query = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.randn(8))
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.register_buffer("text", torch.randn(2, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.linear(x)) * self.scale
        h = h.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        h = self.depthwise(functional.silu(self.pointwise(h))).flatten(2).transpose(1, 2)
        key = self.text @ (self.text.mT @ self.text)
        h = h + (self.query(h) @ key.mT).softmax(-1) @ self.text
        return h @ (h.mT @ h)


WEIGHT, IMAGE_WEIGHT, BIAS = torch.randn(8, 8), torch.randn(8, 8, 1, 1), torch.randn(8)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("fn", "shape", "ideal"),
    [
        pytest.param(lambda x: functional.linear(x, WEIGHT, BIAS), (2, 5, 8), 2, id="linear"),
        pytest.param(lambda x: functional.conv2d(x, IMAGE_WEIGHT, BIAS), (2, 8, 3, 3), 2, id="convolution"),
        pytest.param(
            lambda x: functional.conv2d(x, WEIGHT[:, :1, None, None].expand(-1, -1, 3, 3), groups=8, padding=1),
            (2, 8, 3, 3),
            2,
            id="depthwise",
        ),
        pytest.param(lambda x: functional.conv_transpose2d(x, IMAGE_WEIGHT, BIAS), (2, 8, 3, 3), 2, id="transposed"),
        pytest.param(lambda x: WEIGHT @ x, (2, 8, 5), 2, id="constant_left"),
        pytest.param(lambda x: x @ WEIGHT.expand(2, 8, 8), (2, 5, 8), 2, id="constant_right"),
        pytest.param(lambda x: torch.baddbmm(BIAS, x, WEIGHT.expand(2, 8, 8), beta=0.5), (2, 5, 8), 2, id="baddbmm"),
        pytest.param(lambda x: x @ x.mT, (2, 5, 8), 3, id="two_duals"),
        pytest.param(lambda x: x * (WEIGHT @ WEIGHT).sum(), (2, 5, 8), 1, id="constants"),
    ],
)
def test_a_product_and_its_derivative_take_no_more_products_than_the_product_rule(
    fn: Callable[[Tensor], Tensor], shape: tuple[int, ...], ideal: int
) -> None:
    x, dx = torch.randn(shape), torch.randn(shape)
    counts: list[int] = []
    compiled = torch.compile(derivative(fn), backend=counting(counts), fullgraph=True)
    torch.testing.assert_close(compiled(x, dx), derivative(fn)(x, dx))
    before, after = counts
    assert after == ideal
    assert before == (3 if ideal == 2 else ideal)


def counting(counts: list[int]) -> Callable[..., object]:
    """A backend that folds the forward graph of AOTAutograd, notes its products before and after, and runs it."""

    def fold(module: GraphModule, _: list[Tensor]) -> Callable[..., object]:
        counts.append(products(module.graph))
        removed = fold_zero_operands(module.graph)
        module.graph.lint()
        counts.append(products(module.graph))
        assert removed == counts[-2] - counts[-1]
        return make_boxed_func(module)

    return aot_autograd(fw_compiler=fold, bw_compiler=lambda module, _: make_boxed_func(module))


def values_and_gradients(net: nn.Module, run: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> object:
    y, dy = run(*inputs)
    assert not dy.requires_grad
    return y, dy, torch.autograd.grad(y.square().mean(), list(net.parameters()))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_network_keeps_its_values_and_gradients() -> None:
    torch.manual_seed(0)
    net, counts = Net().double(), []
    inputs = [torch.randn(2, 16, 8, dtype=torch.float64) for _ in range(2)]
    eager = derivative(net)
    compiled = torch.compile(eager, backend=counting(counts), fullgraph=True)
    torch.testing.assert_close(
        values_and_gradients(net, compiled, *inputs), values_and_gradients(net, eager, *inputs), rtol=1e-12, atol=1e-12
    )
    assert counts[0] > counts[1] == Net.IDEAL


class Count(CustomGraphPass):
    """Notes the products of the graphs that inductor is about to lower: forward, then backward."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, graph: Graph) -> None:
        self.counts.append(products(graph))

    def uuid(self) -> None:
        return None  # never answer from the cache: there would be nothing to count


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_runs_the_pass_where_its_options_ask_for_it() -> None:
    torch.manual_seed(0)
    net, count = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 8, 1)), Count()
    inputs = [torch.randn(4, 8) for _ in range(2)]
    eager = derivative(net)
    options = {**fold_options(), "post_grad_custom_post_pass": count}
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, options=options)
    torch.testing.assert_close(
        values_and_gradients(net, compiled, *inputs), values_and_gradients(net, eager, *inputs), rtol=1e-5, atol=1e-5
    )
    assert count.counts[0] == 2 * 2
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_options_are_equal_so_that_functions_share_compiled_code() -> None:
    assert fold_options() == fold_options()


def test_a_graph_without_zeros_stays_as_it_is() -> None:
    def fn(x: Tensor, image: Tensor, bias: Tensor) -> Tensor:
        half = torch.cat([torch.zeros(5, 4), torch.full((5, 4), 1.0)], dim=-1)
        return torch.addmm(bias, x + half, torch.full((8, 8), 0.5)) + functional.conv2d(image, image, bias).sum()

    traced = trace(fn, torch.randn(5, 8), torch.randn(8, 8, 3, 3), torch.randn(8))
    before = traced.code
    assert fold_zero_operands(traced.graph) == 0
    assert traced.code == before


def test_zeros_go_through_views_casts_and_products() -> None:
    def fn(x: Tensor) -> Tensor:
        zero = torch.full((2, 4), 0.0, dtype=torch.float64).t().to(torch.float32)
        zero = torch.cat([zero, zero.clone()])[None].expand(3, 8, 2).reshape(24, 2)[:8] * x[:, :1]
        return (zero @ x[:2] @ x.mT).sum(-1, keepdim=True) @ x[:1]  # three products

    x = torch.randn(8, 8)
    traced = trace(fn, x)
    assert fold_zero_operands(traced.graph) == 3
    assert products(traced.graph) == 0
    assert torch.equal(traced(x), torch.zeros(8, 8))


def test_a_structural_zero_times_infinity_is_zero() -> None:
    x = torch.full((4, 4), torch.inf)
    traced = trace(lambda x: torch.zeros(2, 4) @ x, x)
    assert traced(x).isnan().all()
    assert fold_zero_operands(traced.graph) == 1
    assert torch.equal(traced(x), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda b, m: torch.addmm(b, torch.zeros(5, 8), m, beta=0.5, alpha=3), id="addmm"),
        pytest.param(lambda b, m: torch.addmm(b / 0, torch.zeros(5, 8), m, beta=0), id="addmm_without_summand"),
        pytest.param(lambda b, m: torch.baddbmm(b, torch.zeros(3, 5, 8), m.expand(3, 8, 8), beta=2), id="baddbmm"),
        pytest.param(lambda b, m: functional.conv2d(torch.zeros(2, 8, 3, 3), m[..., None, None], b), id="conv2d"),
        pytest.param(lambda b, m: functional.conv1d(m[None], torch.zeros(8, 8, 3), b, padding=1), id="conv1d"),
    ],
)
def test_the_bias_of_a_zero_product_remains(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    bias, matrix = torch.randn(8), torch.randn(8, 8)
    traced = trace(fn, bias, matrix)
    assert fold_zero_operands(traced.graph) == 1
    assert products(traced.graph) == 0
    torch.testing.assert_close(traced(bias, matrix), fn(bias, matrix), check_stride=True)


def test_a_product_of_dynamic_shape_stays() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.zeros(4, x.shape[0]) @ x

    traced = make_fx(fn, tracing_mode="symbolic")(torch.randn(5, 3))
    assert fold_zero_operands(traced.graph) == 0
    assert torch.equal(traced(torch.randn(6, 2)), torch.zeros(4, 2))


def test_zeros_keep_the_layout_of_the_product() -> None:
    """Sana's convolutions see tokens as images whose channels lie next to each other; what follows views them back."""

    def fn(x: Tensor) -> Tensor:
        return functional.conv2d(x.permute(0, 3, 1, 2), torch.zeros(6, 8, 1, 1)).permute(0, 2, 3, 1).view(2, 12, 6)

    x = torch.randn(2, 3, 4, 8)
    traced = trace(fn, x)
    assert fold_zero_operands(traced.graph) == 1
    torch.testing.assert_close(traced(x), fn(x), check_stride=True)


def test_sums_with_zeros_keep_shape_and_dtype() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x + torch.zeros(4),  # from here on copies of x
            torch.zeros(1, 4) + x,
            x - torch.zeros(3, 4),
            x + torch.zeros(2, 1, 4),  # from here on sums: another shape, another dtype, not the same values
            x + torch.zeros(4, dtype=torch.float64)[None].expand(3, 4),
            torch.zeros(3, 4) - x,
            torch.add(torch.zeros(3, 4), x, alpha=2),
        )

    x = torch.randn(3, 4)
    traced = trace(fn, x)
    fold_zero_operands(traced.graph)
    torch.testing.assert_close(traced(x), fn(x), rtol=0, atol=0, check_stride=True)
    names = operators(traced.graph)
    assert (names.count(aten.clone), names.count(aten.add) + names.count(aten.sub)) == (3, 4)


def test_an_output_does_not_become_an_input() -> None:
    x = torch.randn(3, 4)
    traced = trace(lambda x: (x + torch.zeros(4), x + torch.zeros(4)), x)
    fold_zero_operands(traced.graph)
    assert len({tensor.data_ptr() for tensor in (x, *traced(x))}) == 3


def test_zeros_that_are_written_to_are_no_constants() -> None:
    def fn(x: Tensor) -> Tensor:
        state = torch.zeros(4, 4)
        state[:2].add_(x[:2])
        return state @ x

    x = torch.randn(4, 4)
    traced = trace(fn, x)
    assert fold_zero_operands(traced.graph) == 0
    torch.testing.assert_close(traced(x), fn(x), rtol=0, atol=0)


def test_an_input_may_be_written_to_at_the_end() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x + torch.zeros(4)
        x.copy_(torch.ones(4, 4) + torch.zeros(4, 4) @ x)
        return y

    x = torch.randn(4, 4)
    traced, old = trace(fn, x), x.clone()
    assert fold_zero_operands(traced.graph) == 1
    assert torch.equal(traced(x), old)
    assert torch.equal(x, torch.ones(4, 4))
