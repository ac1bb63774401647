from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tbcm.runtime.graphs import Graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


class Counted:
    """A function of two tensors that counts its runs, with a weight in it."""

    def __init__(self, device: str | torch.device) -> None:
        self.layer = nn.Linear(8, 8, device=device)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 64).sin().view(8, 8))
            self.layer.bias.fill_(0.5)
        self.runs = 0

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        self.runs += 1
        y = self.layer(tensors["x"]).tanh()
        return y * tensors["w"], y.sum()


def graphed(fn: Counted, limit: int = 8) -> Graphed:
    return Graphed(fn, switch="teacher.cuda_graph=false", limit=limit)


def inputs(seed: int, batch: int = 4, device: str | torch.device = GPU) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"x": torch.randn(batch, 8, generator=generator), "w": torch.randn(batch, 1, generator=generator)}
    return {name: value.to(device) for name, value in tensors.items()}


@torch.no_grad()
def eager(fn: Counted, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return fn(tensors)


def test_on_a_cpu_the_function_is_called() -> None:
    fn = Counted("cpu")
    run = graphed(fn, limit=1)
    for seed, batch in enumerate((4, 4, 6)):
        tensors = inputs(seed, batch, "cpu")
        torch.testing.assert_close(run(tensors), eager(fn, tensors), rtol=0, atol=0)
    assert fn.runs == 6


def test_on_a_cpu_too_no_gradient_flows() -> None:
    assert not any(y.requires_grad for y in graphed(Counted("cpu"))(inputs(0, device="cpu")))


@needs_gpu
def test_replays_equal_the_function() -> None:
    fn = Counted(GPU)
    run = graphed(fn)
    for seed in range(3):
        tensors = inputs(seed)
        torch.testing.assert_close(run(tensors), eager(fn, tensors))
    assert fn.runs == 3 + 1 + 3  # warm-up, capture and ours: replays run no Python


@needs_gpu
def test_two_shapes_in_turn() -> None:
    fn = Counted(GPU)
    run = graphed(fn)
    for seed, batch in enumerate((4, 1000, 4, 1000, 4)):
        tensors = inputs(seed, batch)
        torch.testing.assert_close(run(tensors), eager(fn, tensors))
    assert fn.runs == 2 * (3 + 1) + 5


@needs_gpu
def test_results_are_the_callers() -> None:
    fn = Counted(GPU)
    run = graphed(fn)
    results = [(run(inputs(seed, batch)), eager(fn, inputs(seed, batch))) for seed, batch in enumerate((4, 4, 9, 4, 9))]
    for got, expected in results:  # compared when all calls are done
        torch.testing.assert_close(got, expected)


@needs_gpu
def test_inputs_are_the_callers() -> None:
    run = Graphed(lambda tensors: (tensors["x"].mul_(2), tensors["x"]), switch="")
    x = torch.ones(3, device=GPU)
    for _ in range(2):
        double, same = run({"x": x})
        assert (x == 1).all()
        x.zero_()
        assert (double == 2).all()
        assert (same == 2).all()
        x.fill_(1)


@needs_gpu
def test_inputs_of_any_strides() -> None:
    fn = Counted(GPU)
    run = graphed(fn)
    x = inputs(0, 8)["x"]
    for tensors in ({"x": x.T, "w": x[:1, :1].expand(8, 1)}, {"x": x[:1].expand(8, 8), "w": x[:, 3:4]}):
        torch.testing.assert_close(run(tensors), eager(fn, tensors))
    assert fn.runs == 3 + 1 + 2


@needs_gpu
def test_weights_that_change_in_place_are_seen_under_autocast() -> None:
    fn = Counted(GPU)
    run, tensors = graphed(fn), inputs(0)
    with torch.autocast("cuda", torch.bfloat16):  # one region: its cache of cast weights lives as long
        eager(fn, tensors)  # ... and now holds this one
        before = run(tensors)[0]
        with torch.no_grad():
            fn.layer.weight.mul_(3)
        after = run(tensors)[0]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = eager(fn, tensors)[0]
    torch.testing.assert_close(after, expected, rtol=0.02, atol=0.02)
    assert (after - before).abs().max() > 0.1


@needs_gpu
def test_each_precision_has_its_graph() -> None:
    layer = nn.Linear(8, 8, device=GPU)
    run = Graphed(lambda tensors: (layer(tensors["x"]),), switch="")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            assert run({"x": inputs(0)["x"]})[0].dtype == dtype


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    """x is written on a side stream after a long wait there: on any other stream a replay would come too early."""
    fn = Counted(GPU)
    run, tensors, late = graphed(fn), inputs(0), inputs(1)
    run(tensors)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        tensors["x"].copy_(late["x"])
        got = run(tensors)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, eager(fn, tensors))


@needs_gpu
def test_calls_from_two_streams_do_not_mix() -> None:
    def slow(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        torch.cuda._sleep(200_000_000)
        return (tensors["x"] * 2,)

    run, one, two = Graphed(slow, switch=""), torch.ones(4, device=GPU), torch.full((4,), 2.0, device=GPU)
    run({"x": one})
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        (first,) = run({"x": one})
    (second,) = run({"x": two})  # while the first one sleeps
    torch.cuda.synchronize()
    assert (first == 2).all()
    assert (second == 4).all()


@needs_gpu
def test_beyond_the_limit_there_are_no_graphs(caplog: pytest.LogCaptureFixture) -> None:
    fn = Counted(GPU)
    run = graphed(fn, limit=1)
    with caplog.at_level(logging.WARNING, "tbcm"):
        for seed, batch in enumerate((4, 5, 6, 4)):
            tensors = inputs(seed, batch)
            torch.testing.assert_close(run(tensors), eager(fn, tensors))
    assert fn.runs == (3 + 1) + 2 + 4
    assert [record.getMessage() for record in caplog.records] == [
        "1 CUDA graphs are captured: inputs of other shapes run without one"
    ]


FAILING = """
import torch
from tbcm.errors import UserError
from tbcm.runtime.graphs import Graphed
reads = Graphed(lambda tensors: (tensors["x"] * tensors["x"].sum().item(),), switch="teacher.cuda_graph=false")
before = torch.cuda.current_stream()
try:
    reads({"x": torch.ones(4, device="cuda")})
except UserError as error:
    print(error)
print("same stream", torch.cuda.current_stream() == before, flush=True)
"""


@needs_gpu
def test_a_function_that_cannot_be_captured_is_one_line() -> None:
    """In a process of its own, as a broken capture may leave traces in CUDA's state."""
    child = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    message, stream, *_ = child.stdout.splitlines()
    assert message.startswith("capturing a CUDA graph failed (")
    assert message.endswith("): set teacher.cuda_graph=false")
    assert "when stream is capturing" in message  # what item() did, not that the capture is broken
    assert stream == "same stream True"
