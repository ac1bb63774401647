"""What ranks exchange is what the formulas say; the model of a cluster gives what a hand works out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import scaling
import torch
import torch.distributed as dist
from scripts import script
from speed import cluster, on_ranks, scaling_model
from speed.collectives import Collectives, Traffic, ring_bytes
from speed.flops import count
from speed.measure import parts
from speed.on_ranks import Task, configuration
from speed.scaling_model import Cluster, Ring, Work, predict, rate, traffic, unit_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore

from tbcm.runtime import distributed
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
TASK = Task("tiny", ["ddp", "fsdp"], prompts=1, points=4, steps=3, device_type="cpu")
FEW = 2  # collectives of at most one number a weight: which ddp used, or their norms under fsdp; whether all is finite
FEW_BYTES = 600


@pytest.fixture
def thirty_two_ranks() -> Iterator[None]:
    """This process is one of them, and the others are imagined: collectives have their sizes and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "ranks", "sent"),
    [
        ("all_reduce", 2, 800),
        ("all_gather", 2, 400),
        ("reduce_scatter", 4, 600),
        ("all_reduce", 1, 0),
        ("broadcast", 2, 400),
    ],
)
def test_bytes_that_a_rank_sends_round_a_ring(kind: str, ranks: int, sent: float) -> None:
    assert ring_bytes(kind, 800, ranks) == sent


def test_a_collective_whose_bytes_are_not_known_is_an_error(thirty_two_ranks: None) -> None:
    with Collectives() as collectives:
        dist.all_reduce(torch.zeros(100))
    assert collectives.traffic == {"all_reduce": Traffic(1, 2 * 400 * 31 / 32)}
    with pytest.raises(NotImplementedError, match="scatter_"), Collectives():
        dist.scatter(torch.zeros(100), [torch.zeros(100)] * 32)


def test_a_shard_is_padded() -> None:
    assert unit_bytes([[(5, 3), (8,)], [(2, 2)]], 4) == [4 * (8 * 3 + 8), 4 * 4 * 2]


@pytest.mark.parametrize(("mode", "shard"), [("fsdp", 32), ("hsdp", 8)])
def test_32_ranks_exchange_what_the_formulas_say(thirty_two_ranks: None, mode: str, shard: int) -> None:
    config = configuration(TASK, 32, "fsdp")
    config = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"shard": shard}),
            "train": config.train.model_copy(update={"points_per_micro_batch": 2}),
        }
    )
    trainer = Trainer(config, CPU, parts(config, CPU))
    with Collectives() as collectives:
        trainer.train_step()
    alone = configuration(TASK, 1, "fsdp").model_copy(update={"train": config.train})
    with distributed.alone():
        work = scaling_model.work_of(alone)
    assert work.micro_batches == 2
    check(collectives.traffic, traffic(mode, work, 32, shard))


def check(counted: dict[str, Traffic], formula: dict[str, Traffic]) -> None:
    """The same but for collectives of a few numbers, which reduce."""
    assert formula
    for kind in {*counted, *formula}:
        count, size = counted[kind]
        expected = formula.get(kind, Traffic())
        few = kind == "all_reduce"
        assert count == expected.calls + FEW * few
        assert 0 <= size - expected.bytes <= FEW_BYTES * few


def test_the_flops_of_a_step_by_phase() -> None:
    config = configuration(TASK, 1, "ddp")
    work = scaling_model.work_of(config)
    assert work.flops == count(config)
    assert min(work.rollout, work.forward, work.backward) > 0


# The model, with numbers that a hand can follow: 1 MFLOP/s, 100 B/s over NVLink, 40 B/s from a node.

SMALL = Cluster(nodes=2, gpus=4, flops=1e6, nvlink=100.0, network=40.0, latency=0.5, overlap=0.5)
WORK = Work(rollout=10e6, forward=20e6, backward=40e6, micro_batches=2, units=[[(8, 10)], [(8, 5)], [(8, 5)]])


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    assert [rate(ring, SMALL) for ring in (Ring.NODE, Ring.ALL, Ring.ACROSS)] == [100, 40, 10]
    assert rate(Ring.ALL, Cluster(1, 4, 1e6, 100.0, 40.0, 0.5, 0.5)) == 100


def test_ddp_hides_behind_the_last_backward_pass() -> None:
    sent = 2 * 4 * 160 * 7 / 8  # 1,120 bytes
    assert traffic("ddp", WORK, 8, 8) == {"all_reduce": Traffic(1, sent)}
    predicted = predict("ddp", WORK, SMALL)
    assert predicted.compute == 70
    # One bucket, which nothing hides: 1,120 B at 40 B/s, and the latencies of it and of two collectives of few numbers.
    assert predicted.exposed == pytest.approx(28 + 0.5 + 1)
    assert predicted.efficiency == pytest.approx(70 / 99.5)


def test_fsdp_gathers_in_each_pass_and_scatters_in_the_last() -> None:
    whole = 4 * 160 * 7 / 8  # 560 bytes, 280 of them of the two blocks
    counted = traffic("fsdp", WORK, 8, 8)
    assert counted == {"all_gather": Traffic(10, 2 * whole + whole), "reduce_scatter": Traffic(3, whole)}
    # Two forward passes of 10 s and two backward passes of 20 s, half of which may hide something.
    forward = 560 / 40 + 3 * 0.5
    first, last = 280 / 40 + 2 * 0.5, 280 / 40 + 2 * 0.5 + 560 / 40 + 3 * 0.5
    expected = 2 * max(forward - 5, forward / 3) + max(first - 10, first / 3) + max(last - 10, last / 3) + 1
    assert predict("fsdp", WORK, SMALL).exposed == pytest.approx(expected)


def test_hsdp_sends_its_shards_alone_between_nodes() -> None:
    counted = traffic("hsdp", WORK, 8, 4)
    assert counted["all_gather"].bytes == 3 * 4 * 160 * 3 / 4
    assert counted["reduce_scatter"].bytes == 4 * 160 * 3 / 4
    assert counted["all_reduce"] == Traffic(3, 2 * 160 / 2)
    # Forward passes have room for all but their first gather; so has the first backward pass. In the last the network
    # is busy for longer than NVLink.
    forward, first, network = 480 / 100 + 3 * 0.5, 240 / 100 + 2 * 0.5, 160 / 10 + 3 * 0.5
    expected = 2 * max(forward - 5, forward / 3) + first / 3 + max(network - 10, network / 3) + 1
    assert predict("hsdp", WORK, SMALL).exposed == pytest.approx(expected)
    assert expected < predict("fsdp", WORK, SMALL).exposed


def test_more_samples_and_a_faster_network_scale_better() -> None:
    faster = Cluster(2, 4, 1e6, 100.0, 400.0, 0.5, 0.5)
    for mode in scaling_model.MODES:
        base = predict(mode, WORK, SMALL).efficiency
        assert base < predict(mode, WORK.times(4, 8), SMALL).efficiency < 1
        assert base < predict(mode, WORK, faster).efficiency < 1


def test_rows_compare_arms_step_by_step() -> None:
    """A machine that becomes twice as slow half way changes no ratio."""
    slow = [1.0, 1.0, 2.0, 2.0]
    measured = {
        "seconds": {
            on_ranks.SINGLE: slow,
            "ddp": [1.25 * s for s in slow],
            on_ranks.without("ddp"): [1.0 * s for s in slow],
        },
        "traffic": {"ddp": {"all_reduce": [3, 1000.0]}},
    }
    single, ddp = scaling.rows_of(Task("tiny", ["ddp"], 2, 4, 4, "cpu"), 2, measured)
    assert (single["samples"], ddp["samples"], single["samples_per_s"]) == (6, 12, 4.0)
    assert (ddp["efficiency"], ddp["efficiency_without_exchange"]) == (0.8, 1.0)
    assert (ddp["exposed_ms"], ddp["collectives"], ddp["all_reduce_bytes"]) == (375.0, 3, 1000)


def test_two_ranks_measured(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--prompts", "1", "--points", "4", "--steps", "3", "--out", str(tmp_path)]
    done = script("bench/scaling.py", *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [(row["ranks"], row["mode"], row["samples"]) for row in rows] == [
        (1, "single", 3),
        (2, "ddp", 6),
        (2, "fsdp", 6),
    ]
    work = scaling_model.work_of(configuration(TASK, 1, "ddp"))
    for row in rows:
        assert row["modelled"] is False and row["commit"] and row["steps"] == 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["samples_per_s"] == pytest.approx(1000 * row["samples"] / row["median_ms"])
    for row in rows[1:]:
        assert row["efficiency"] > 0 and row["without_exchange_ms"] > 0
        formula = traffic(row["mode"], work, 2, 2)
        for kind, (_, size) in formula.items():
            assert size <= row[f"{kind}_bytes"] <= size + FEW_BYTES * (kind == "all_reduce")
        assert row["collectives"] == sum(count for count, _ in formula.values()) + FEW
    assert "| tiny | 2 | ddp | 6 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks", "0"], "--ranks and --prompts should be at least 1, --points and --steps at least 2"),
        (["--predict", "--utilisation", "1.2"], "--utilisation 1.2: should be above 0 and at most 1"),
        (["--predict", "--nodes", "0"], "--nodes 0: should be above 0"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py", "--device", "cpu", *arguments])
    assert scaling.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}"]


def test_the_model_is_headed_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "recipe", lambda model: WORK.times(1e6, 3))
    monkeypatch.setattr("sys.argv", ["scaling.py", "--predict", "--out", str(tmp_path)])
    assert scaling.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL of 4 nodes x 8 GPUs, not a measurement. It assumes:")
    assert all(f"* {name} " in printed for name in ("peak", "utilisation", "nvlink", "network", "latency", "overlap"))
    rows = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["ddp", "fsdp", "hsdp"] * 2
    assert all(row["modelled"] and row["assumed"]["network"] == 400 and row["ranks"] == 32 for row in rows)
