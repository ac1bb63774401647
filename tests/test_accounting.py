from __future__ import annotations

import torch
from helpers import random_condition, tiny_sana
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tbcm.accounting import CostCounter
from tbcm.models.sana import SanaTrigFlow


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
