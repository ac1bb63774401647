from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tbcm_kernels.catalog import Dual
from tbcm_kernels.gated_residual import gated_residual
from torch import Tensor, nn

from tbcm.models.differentiation.checkpointing import full_checkpoint, selective_checkpoint
from tbcm.models.differentiation.dual import dual


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Part(nn.Module):
    """x + modulation L2 silu(L1 (x text)): reads what a transformer block reads, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 32).double(), nn.SiLU(), nn.Linear(32, 4).double()
        self.runs = 0

    def forward(self, x: Tensor, dx: Tensor | None, m: Tensor, dm: Tensor | None, text: Tensor) -> Dual:
        self.runs += 1
        h: Dual = (x * text, None if dx is None else dx * text.detach())
        return gated_residual((x, dx), (m, dm), dual(self.second, dual(self.act, dual(self.first, h))))


def whole(part: Part, x: Dual, modulation: Dual, text: Tensor) -> Dual:
    return part(*x, *modulation, text)


def full(part: Part, x: Dual, modulation: Dual, text: Tensor) -> Dual:
    return full_checkpoint(part, x, modulation, text, list(part.parameters()))


MODES: dict[str, Callable[..., Dual]] = {"full": full, "selective": selective_checkpoint}
every_mode = pytest.mark.parametrize("mode", MODES)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, 5, 4).requires_grad_(), randn(1, 5, 4).requires_grad_(), randn(2, 1, 4).requires_grad_()


def saved(work: Callable[[], Dual]) -> tuple[Dual, list[Tensor]]:
    """What `work` returns, and the tensors it keeps for backward (those that checkpoints keep by themselves not)."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return work(), kept


@every_mode
@pytest.mark.parametrize("tangents", [True, False])
def test_values_derivatives_and_gradients_are_the_plain_ones(mode: str, tangents: bool) -> None:
    part, results = Part(), []
    dx, dm = (randn(3, 5, 4), randn(4, 5, 4)) if tangents else (None, None)
    for run in (whole, MODES[mode]):
        part.zero_grad()
        x, modulation, text = inputs()
        value, derivative = run(part, (x, dx), (modulation, dm), text)
        assert (derivative is not None) == tangents
        assert derivative is None or not derivative.requires_grad
        (value * randn(5, 5, 4)).sum().backward()
        results.append([value, derivative, x.grad, modulation.grad, text.grad, *(p.grad for p in part.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@every_mode
def test_backward_runs_the_part_once_more_and_nothing_is_kept_but_inputs_and_parameters(mode: str) -> None:
    part, (x, modulation, text) = Part(), inputs()
    tangent = torch.ones_like(x)
    (value, _), kept = saved(lambda: MODES[mode](part, (x, tangent), (modulation, tangent), text))
    given = {tensor.data_ptr() for tensor in (x, modulation, text, *part.parameters())}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel()} <= given  # torch 2.11 keeps an empty one's place
    assert part.runs == 1
    value.sum().backward()
    assert part.runs == 2


def test_selective_repeats_no_product_of_a_linear_layer() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in MODES:
        part, (x, modulation, text) = Part(), inputs()
        value, _ = MODES[mode](part, (x, torch.ones_like(x)), (modulation, torch.ones_like(x)), text)
        with Count() as count:
            value.sum().backward()
        counts[mode] = count.products
    assert counts == {"selective": 4, "full": 6}  # two layers, a product each for input and weight, and their values


def test_a_second_backward_through_a_selective_checkpoint_recomputes_nothing_wrong() -> None:
    """What was kept is used up by the first: a second is refused, not answered with other layers' results."""
    part, (x, modulation, text) = Part(), inputs()
    value, _ = selective_checkpoint(part, (x, None), (modulation, None), text)
    value.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        value.sum().backward()


@every_mode
def test_recomputation_runs_under_the_autocast_of_the_forward_pass(mode: str) -> None:
    part, seen = Part().float(), []
    part.first.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    x, modulation, text = (tensor.detach().float().requires_grad_() for tensor in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = MODES[mode](part, (x, x.detach()), (modulation, x.detach()), text)
    value.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
