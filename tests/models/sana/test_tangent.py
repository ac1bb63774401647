"""The derivative of the network and the gradients beside it: exact, checkpointed, compiled, in mixed precision."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from sana_cases import Batch, backbone_of, every_backbone
from torch import Tensor

from tbcm.models.sana.network import SanaTrigFlow

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on the CPU"
)


WAYS = [
    {"tangent": tangent, "derivative": derivative, "checkpointing": checkpointing}
    for tangent in ("one_pass", "two_pass")
    for derivative in ("dual", "jvp")
    for checkpointing in ("none", "selective", "full")
    if (tangent, derivative, checkpointing) != ("one_pass", "jvp", "selective")
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


@pytest.mark.usefixtures("double_throughout")
@every_backbone
@pytest.mark.parametrize("derivative", ["dual", "jvp"])
def test_the_derivative_is_that_of_finite_differences(kind: str, derivative: str) -> None:
    net = SanaTrigFlow(backbone_of(kind).double(), timestep_scale=1.0, derivative=derivative)
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
def test_every_way_gives_the_same_answers_and_gradients(kind: str) -> None:
    """Hand-written or by torch.func.jvp, in one pass or two, checkpointed or not, text shared or repeated."""
    batch, results = Batch(torch.float64), []
    for way in ({}, *WAYS, {"text_once": False}):
        net = SanaTrigFlow(backbone_of(kind).double(), timestep_scale=1000.0, logvar=True, **way).double()
        answer, gradients = batch.predict(net), batch.gradients(net)
        assert gradients.keys() == dict(net.named_parameters()).keys()
        assert all(gradient.any() for gradient in gradients.values())
        results.append({"F": answer.F, "dF": answer.dF, "logvar": answer.logvar, **gradients})
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


@every_way
def test_the_derivative_carries_no_graph(way: dict[str, str]) -> None:
    net = SanaTrigFlow(backbone_of("guidance"), timestep_scale=1.0, logvar=True, **way)
    answer = Batch().predict(net)
    assert answer.F.requires_grad
    assert answer.logvar.requires_grad
    assert not answer.dF.requires_grad


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("tangents", [True, False])
def test_checkpointing_recomputes_blocks_and_changes_no_gradient(checkpointing: str, tangents: bool) -> None:
    backbone, batch, runs = backbone_of("guidance"), Batch(), {}
    for mode in ("none", checkpointing):
        net = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0, checkpointing=mode)
        block = net.backbone.transformer_blocks[0]
        block.compute = Mock(wraps=block.compute)
        runs[mode] = batch.gradients(net, tangents), block.compute.call_count
    torch.testing.assert_close(runs[checkpointing][0], runs["none"][0], rtol=1e-5, atol=1e-5)
    assert (runs["none"][1], runs[checkpointing][1]) == (1, 2)


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("way", "backend"),
    [({}, "inductor"), ({"derivative": "jvp"}, "inductor"), ({"checkpointing": "full"}, "aot_eager")],
    ids=str,
)
def test_compiled_predictions_and_gradients_are_the_eager_ones(
    way: dict[str, str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    backbone, batch = backbone_of("guidance", num_layers=1), Batch()
    eager = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0)
    compiled = SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0, compiled=True, **way)
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


@every_way
def test_mixed_precision_derivatives(way: dict[str, str]) -> None:
    backbone, batch = backbone_of("guidance"), Batch()
    exact = batch.predict(SanaTrigFlow(deepcopy(backbone), timestep_scale=1.0))
    net = SanaTrigFlow(backbone, timestep_scale=1.0, logvar=True, **way)
    with torch.autocast("cpu", torch.bfloat16):
        answer = batch.predict(net)
    answer.F.sum().backward()
    for got, expected in ((answer.F, exact.F), (answer.dF, exact.dF)):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.05 * expected.norm()
    assert answer.logvar.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.backbone.parameters())
