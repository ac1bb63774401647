from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from helpers import random_condition, tiny_sana
from tbcm_kernels import attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tbcm.errors import UserError
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.training.accounting import CostCounter


def test_flops_of_a_linear_layer_forward_and_backward() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    with CostCounter() as counter:
        y = layer(x)
        assert counter.flops == 2 * 3 * 7 * 5
        y.sum().backward()
    assert counter.flops == 3 * 2 * 3 * 7 * 5  # and the gradients of weight and input


def test_flops_of_a_depthwise_convolution() -> None:
    """Grouped: each output channel sees one input channel, backward too."""
    layer, x = nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.randn(2, 6, 4, 4, requires_grad=True)
    with CostCounter() as counter:
        y = layer(x)
        once = 2 * (2 * 6 * 4 * 4) * 9
        assert counter.flops == once
        y.sum().backward()
    assert counter.flops == 3 * once


def counted(work: Callable[[], Tensor]) -> int:
    with CostCounter() as counter:
        work()
    return counter.flops


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("heads", "keys_heads"), [(4, 4), (4, 2)])  # GQA: a head of keys for two of queries
@pytest.mark.parametrize("fake", [False, True])
def test_flops_of_attention(mask: bool, heads: int, keys_heads: int, fake: bool) -> None:
    """Scores and their product with the values; backward, the scores anew and four gradients."""
    with FakeTensorMode() if fake else contextlib.nullcontext(), CostCounter() as counter:
        query = torch.randn(3, heads, 7, 8, requires_grad=True)
        key, value = (torch.randn(3, keys_heads, 11, 8, requires_grad=True) for _ in range(2))
        hidden = torch.rand(7, 11) if mask else None
        y = functional.scaled_dot_product_attention(query, key, value, hidden, enable_gqa=heads != keys_heads)
        product = 2 * 3 * heads * 7 * 11 * 8
        assert counter.flops == 2 * product
        y.sum().backward()
    assert counter.flops == (2 + 5) * product


def test_flops_of_attention_as_a_gpu_does_it() -> None:
    """By each of its kernels, on tensors without data."""
    aten, meta = torch.ops.aten, torch.device("meta")
    query, key = torch.empty(3, 4, 7, 8, device=meta), torch.empty(3, 4, 11, 8, device=meta)
    value = torch.empty(3, 4, 11, 16, device=meta)  # wider than the keys
    for work in (
        lambda: aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0],
        lambda: aten._scaled_dot_product_fused_attention_overrideable(query, key, value)[0],
    ):
        assert counted(work) == 2 * (3 * 4 * 7 * 11) * (8 + 16)
    same = torch.empty(3, 4, 11, 8, device=meta)
    assert counted(lambda: aten._scaled_dot_product_flash_attention(query, key, same)[0]) == 2 * (3 * 4 * 7 * 11) * 16


def test_flops_of_attention_with_a_tangent() -> None:
    """Those of the products that it makes inside."""
    q, k = torch.randn(2, 3, 700, 8), torch.randn(2, 3, 11, 8)
    v = torch.randn(2, 3, 11, 16)
    forward, backward = (q, q, k, k, v, v, None, 0.3), (torch.randn(2, 3, 700, 16), q, k, v, None, 0.3)
    ops = torch.ops.tbcm
    for op, body, arguments in (
        (ops.attention, attention._attention, forward),
        (ops.attention_backward, attention._attention_backward, backward),
    ):
        inside = counted(lambda body=body, arguments=arguments: body._init_fn(*arguments))  # type: ignore[misc]
        assert counted(lambda op=op, arguments=arguments: op(*arguments)) == inside > 0  # type: ignore[misc]


def test_flops_of_products() -> None:
    a, b, c = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    many, others = torch.randn(4, 5, 7), torch.randn(4, 7, 3)
    x, eight = torch.randn(7), torch.ones(32, 32, dtype=torch.int8)
    for work, multiplications in (
        (lambda: a @ b, 5 * 7 * 3),
        (lambda: torch.addmm(c, a, b), 5 * 7 * 3),
        (lambda: c.addmm_(a, b), 5 * 7 * 3),
        (lambda: many @ others, 4 * 5 * 7 * 3),
        (lambda: torch.baddbmm(c, many, others), 4 * 5 * 7 * 3),
        (lambda: torch.addbmm(c, many, others), 4 * 5 * 7 * 3),
        (lambda: a @ x, 5 * 7),
        (lambda: torch.addmv(torch.zeros(5), a, x), 5 * 7),
        (lambda: torch.dot(x, x), 7),
        (lambda: torch._int_mm(eight, eight), 32**3),
        (lambda: torch.einsum("nij,njk->nik", many, others), 4 * 5 * 7 * 3),
    ):
        assert counted(work) == 2 * multiplications


def test_flops_in_inference_mode() -> None:
    """Where operators made of others are not taken apart before they are counted."""
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    with torch.inference_mode():
        assert counted(lambda: layer(x)) == 2 * 3 * 7 * 5
        query = torch.randn(3, 4, 7, 8)
        assert counted(lambda: functional.scaled_dot_product_attention(query, query, query)) == 4 * 3 * 4 * 7 * 7 * 8


def test_flops_of_a_transposed_convolution() -> None:
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 5, 5, requires_grad=True)
    with CostCounter() as counter:
        y = layer(x)
        once = 2 * (2 * 4 * 5 * 5) * (6 // 2) * 9  # every input goes to the outputs of its group, nine times
        assert counter.flops == once
        y.sum().backward()
    assert counter.flops == 3 * once


@torch.library.custom_op("tbcm_tests::fused", mutates_args=())
def fused(x: Tensor) -> Tensor:
    return x @ x


def test_what_cannot_be_counted_is_not_passed_over() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(UserError, match=r"tbcm_tests.fused.default cannot be counted"):
        counted(lambda: fused(x))
    with pytest.raises(UserError, match=r"_cdist_forward.default cannot be counted"):
        counted(lambda: torch.cdist(torch.randn(30, 4), torch.randn(30, 4), p=1.0))
    assert counted(lambda: torch.nn.functional.silu(x).softmax(-1) + x.cumsum(0).t()) == 0


def test_memory_goes_up_and_down_with_storages() -> None:
    for mode in (None, FakeTensorMode()):
        with mode or torch.no_grad(), CostCounter() as counter:
            a = torch.zeros(100)  # 400 bytes
            b = a.view(10, 10)  # shares them
            c = torch.zeros(50)
            assert counter.live == 600
            del a
            assert counter.live == 600
            del b
            assert counter.live == 200
            del c
        assert (counter.live, counter.peak) == (0, 600)


def test_activation_checkpointing_repeats_the_value_and_not_its_tangent() -> None:
    """In units of a forward pass: one pass with tangent T, backward 2; checkpointed one more forward, not T more."""
    u, t, condition = torch.randn(4, 4, 8, 8), torch.rand(4), random_condition(2)

    def flops(checkpointing: str, tangents: bool, backward: bool) -> int:
        net = SanaTrigFlow(tiny_sana(), timestep_scale=1.0, checkpointing=checkpointing)
        with CostCounter() as counter:
            answer = net(u, t, condition, tangents=(u, t) if tangents else None)
            if backward:
                answer.F.sum().backward()
        return counter.flops

    forward = flops("none", False, False)
    for checkpointing, low, high in (("full", 0.8, 1.0), ("selective", 0.0, 0.3)):
        more = flops(checkpointing, True, True) - flops("none", True, True)
        assert low * forward < more <= high * forward


def test_bytes_that_a_block_keeps_for_a_sample() -> None:
    """Of T tokens of width D, under bf16 autocast: full, the fp32 input of the block; selective, also the bf16 results
    of its linear layers (queries, keys, values and output: 3 + 1; queries and output of cross-attention: 1 + 1;
    feed-forward: 5 + 1)."""
    tokens, width, text = 64, 16, random_condition(1)

    def live(checkpointing: str, samples: int, layers: int) -> int:
        backbone = tiny_sana(num_layers=layers, mlp_ratio=2.5)
        net = SanaTrigFlow(backbone, timestep_scale=1.0, checkpointing=checkpointing)
        u, t = torch.randn(samples, 4, 8, 8), torch.rand(samples)
        with torch.autocast("cpu", torch.bfloat16), CostCounter() as counter:
            answer = net(u, t, text, tangents=(u, t))
        assert answer.F.requires_grad
        return counter.live

    def per_block_and_sample(checkpointing: str) -> float:
        kept = {(n, depth): live(checkpointing, n, depth) for n in (2, 4) for depth in (2, 3)}
        return (kept[4, 3] - kept[2, 3] - kept[4, 2] + kept[2, 2]) / 2

    assert per_block_and_sample("full") == 4 * tokens * width
    assert per_block_and_sample("selective") == (4 + 2 * 12) * tokens * width
    assert per_block_and_sample("none") > 2 * (4 + 2 * 12) * tokens * width
