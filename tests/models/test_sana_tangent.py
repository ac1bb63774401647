"""The derivative of the network and the gradients beside it: exact, checkpointed, compiled, in mixed precision."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from sana_cases import Batch, backbone_of, every_backbone
from torch import Tensor

from tbcm.models.sana import SanaTrigFlow

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on the CPU"
)


@pytest.mark.usefixtures("double_throughout")
@every_backbone
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_the_derivative_is_that_of_finite_differences(kind: str, mode: str) -> None:
    net = SanaTrigFlow(backbone_of(kind).double(), timestep_scale=1.0, tangent=mode)
    batch, h = Batch(torch.float64), 1e-5

    @torch.no_grad()
    def at(step: float) -> Tensor:
        return net(batch.u + step * batch.du, batch.t + step * batch.dt, batch.condition, batch.guidance).F

    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # fourth order
    dF = batch.predict(net).dF
    assert (dF - expected).norm() < 1e-8 * expected.norm()
    assert expected.flatten(1).norm(dim=1).min() > 1


@pytest.mark.usefixtures("double_throughout")
@every_backbone
def test_one_pass_equals_two_passes(kind: str) -> None:
    nets = [
        SanaTrigFlow(backbone_of(kind).double(), timestep_scale=1000.0, logvar=True, tangent=mode).double()
        for mode in ("one_pass", "two_pass")
    ]
    batch = Batch(torch.float64)
    one, two = (batch.predict(net) for net in nets)
    torch.testing.assert_close((one.F, one.dF, one.logvar), (two.F, two.dF, two.logvar), rtol=1e-11, atol=1e-11)
    one, two = (batch.gradients(net) for net in nets)
    assert one.keys() == two.keys() == dict(nets[0].named_parameters()).keys()
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert all(gradient.any() for gradient in one.values())


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_derivative_carries_no_graph(mode: str, checkpointing: bool) -> None:
    net = SanaTrigFlow(
        backbone_of("guidance"), timestep_scale=1.0, logvar=True, tangent=mode, gradient_checkpointing=checkpointing
    )
    answer = Batch().predict(net)
    assert answer.F.requires_grad
    assert answer.logvar.requires_grad
    assert not answer.dF.requires_grad


@pytest.mark.parametrize("tangents", [True, False])
def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(tangents: bool) -> None:
    backbone, batch, runs = backbone_of("guidance"), Batch(), {}
    for checkpointing in (False, True):
        net = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0, gradient_checkpointing=checkpointing)
        calls: list[None] = []
        net.backbone.transformer_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        runs[checkpointing] = batch.gradients(net, tangents), len(calls)
    torch.testing.assert_close(runs[True][0], runs[False][0], rtol=1e-5, atol=1e-5)
    assert (runs[False][1], runs[True][1]) == (1, 2)


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_predictions_and_gradients_are_the_eager_ones() -> None:
    backbone, batch = backbone_of("guidance", num_layers=1), Batch()
    eager = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0)
    compiled = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0, compiled=True)
    expected, got = batch.predict(eager), batch.predict(compiled)
    torch.testing.assert_close((got.F, got.dF), (expected.F, expected.dF), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.gradients(compiled), batch.gradients(eager), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_share_their_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs, with and without a derivative, whatever the depth, and no more on later calls."""
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(None)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    net = SanaTrigFlow(backbone_of("guidance", num_layers=3), timestep_scale=1.0, compiled=True)
    batch, counts = Batch(), []
    for tangents in (True, False, True, False):
        batch.predict(net, tangents).F.sum().backward()
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2]


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_derivatives(mode: str, checkpointing: bool) -> None:
    backbone, batch = backbone_of("guidance"), Batch()
    exact = batch.predict(SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0))
    options = {"tangent": mode, "gradient_checkpointing": checkpointing}
    net = SanaTrigFlow(backbone, timestep_scale=1.0, logvar=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        answer = batch.predict(net)
    answer.F.sum().backward()
    for got, expected in ((answer.F, exact.F), (answer.dF, exact.dF)):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.05 * expected.norm()
    assert answer.logvar.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.backbone.parameters())
