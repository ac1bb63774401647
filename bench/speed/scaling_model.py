"""What a training step should take on a cluster: a model with its assumptions, not a measurement.

A rank computes its FLOPs at an assumed fraction of the GPU's peak rate, and sends what `collectives.ring_bytes` says at
an assumed fraction of the slowest link on the ring. Communication hides behind an assumed share of the pass that it
belongs to, but for its first or last piece: FSDP's first gather, the last bucket or shard of a backward pass.

Not in it: optimiser and EMA (of which FSDP leaves each rank a share), FSDP's copies into and out of its buffers, what a
collective takes of the GPU's cores and memory bandwidth from the pass beside it, and ranks that are not equally fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch

from speed.collectives import Traffic, ring_bytes
from speed.measure import parts
from tbcm.config import Config
from tbcm.runtime.phases import PhaseTimer
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.dryrun import eager
from tbcm.training.trainer import Trainer

MODES = "ddp", "fsdp", "hsdp"
_BUCKET = 25 * 2**20  # of DistributedDataParallel, by default
_WEIGHT = 4  # bytes of a weight and of its gradient: fp32, which FSDP gathers and all exchange
_CONTROL = 2  # collectives of a few numbers, which nothing hides: which weights ddp used or fsdp's norm; is it finite


@dataclass(frozen=True)
class Work:
    """FLOPs of a rank's step, in so many micro-batches: of text encoder and teacher, and of the student's forward and
    backward passes. `units`: shapes of the student's weights, of what is in no block and then of each block."""

    rollout: float
    forward: float
    backward: float
    micro_batches: int
    units: Sequence[Sequence[Sequence[int]]]

    @property
    def flops(self) -> float:
        return self.rollout + self.forward + self.backward

    def times(self, factor: float, micro_batches: int) -> Work:
        """With so many times the samples."""
        passes = {name: factor * getattr(self, name) for name in ("rollout", "forward", "backward")}
        return replace(self, **passes, micro_batches=micro_batches)


@dataclass(frozen=True)
class Cluster:
    """`nodes` with `gpus` each. Rates are achieved ones: FLOP/s of a GPU, bytes/s in one direction over NVLink from a
    GPU, and over the network from a node. `latency`: seconds of each collective. `overlap`: the share of a pass that
    communication may hide behind."""

    nodes: int
    gpus: int
    flops: float
    nvlink: float
    network: float
    latency: float
    overlap: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


class Ring(Enum):
    """All ranks, those of a node, or one of each node, beside as many such rings as there are GPUs on a node."""

    ALL = "all"
    NODE = "node"
    ACROSS = "across"


def rate(ring: Ring, cluster: Cluster) -> float:
    """Bytes/s that each rank sends: a ring of all ranks leaves a node once, over all its network adapters together."""
    if ring is Ring.NODE or cluster.nodes == 1:
        return cluster.nvlink
    network = cluster.network / (cluster.gpus if ring is Ring.ACROSS else 1)
    return min(cluster.nvlink, network)


class Sent(NamedTuple):
    kind: str
    traffic: Traffic
    ring: Ring


class Pass(NamedTuple):
    """A student's pass over a micro-batch, and what is exchanged beside it, in so many pieces."""

    flops: float
    sent: list[Sent]
    pieces: int


def unit_bytes(units: Sequence[Sequence[Sequence[int]]], shard: int) -> list[int]:
    """Of each unit's weights; FSDP cuts a weight's first dimension into `shard` equal parts, padding the last."""
    return [
        sum(_WEIGHT * math.ceil(first / shard) * shard * math.prod(rest) for first, *rest in unit) for unit in units
    ]


def passes(mode: str, work: Work, ranks: int, shard: int) -> list[Pass]:
    """Those of a step beside which something is exchanged. `shard`: of how many ranks fsdp and hsdp divide weights."""
    n = work.micro_batches
    if mode == "ddp":
        size = sum(unit_bytes(work.units, 1))
        buckets = math.ceil(size / _BUCKET)
        reduce = Traffic(buckets, ring_bytes("all_reduce", size, ranks))
        return [Pass(work.backward / n, [Sent("all_reduce", reduce, Ring.ALL)], buckets)]
    sizes = unit_bytes(work.units, shard)
    count, size, ring = len(sizes), sum(sizes), Ring.ALL if shard == ranks else Ring.NODE
    gather = Traffic(count, ring_bytes("all_gather", size, shard))
    again = Traffic(count - 1, ring_bytes("all_gather", size - sizes[0], shard))  # what is in no block stays
    scatter = Traffic(count, ring_bytes("reduce_scatter", size, shard))
    forward = Pass(work.forward / n, [Sent("all_gather", gather, ring)], count)
    backward = Pass(work.backward / n, [Sent("all_gather", again, ring)], count)
    exchange = [Sent("reduce_scatter", scatter, ring)]
    if shard < ranks:
        reduce = Traffic(count, ring_bytes("all_reduce", size / shard, ranks // shard))
        exchange.append(Sent("all_reduce", reduce, Ring.ACROSS))
    last = backward._replace(sent=backward.sent + exchange)
    return [forward] * n + [backward] * (n - 1) + [last]


def traffic(mode: str, work: Work, ranks: int, shard: int) -> dict[str, Traffic]:
    """What a rank sends in a step, by kind, but for collectives of a few numbers."""
    total: dict[str, Traffic] = {}
    for one in passes(mode, work, ranks, shard):
        for kind, sent, _ in one.sent:
            total[kind] = total.get(kind, Traffic()).plus(sent)
    return total


class Prediction(NamedTuple):
    """Seconds of a step, and of it the computation and the communication that does not hide behind it."""

    step: float
    compute: float
    exposed: float

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


def predict(mode: str, work: Work, cluster: Cluster) -> Prediction:
    """`mode`: ddp, fsdp (weights sharded over all ranks) or hsdp (over the ranks of a node)."""
    shard = cluster.gpus if mode == "hsdp" else cluster.ranks
    compute = work.flops / cluster.flops
    exposed = _CONTROL * cluster.latency
    for one in passes(mode, work, cluster.ranks, shard):
        seconds = _seconds(one, cluster)
        room = cluster.overlap * one.flops / cluster.flops
        exposed += max(seconds - room, seconds / one.pieces)
    return Prediction(compute + exposed, compute, exposed)


def _seconds(one: Pass, cluster: Cluster) -> float:
    """Of what a pass exchanges. Rings over other links run at the same time (FSDP2 gathers, scatters and reduces on
    streams of their own)."""
    busy = dict.fromkeys(Ring, 0.0)
    for _, sent, ring in one.sent:
        busy[ring] += sent.bytes / rate(ring, cluster) + sent.calls * cluster.latency
    return max(busy.values())


# FLOPs


class _FlopsByPhase(PhaseTimer):
    """FLOPs in place of seconds."""

    def __init__(self, counter: CostCounter) -> None:
        super().__init__(torch.device("cpu"))
        self._counter = counter

    def now(self) -> float:
        return self._counter.flops


def work_of(config: Config) -> Work:
    """Of a rank by itself that takes the configured step: counted as `flops.count` does."""
    twin, device = eager(config), torch.device("cpu")
    with SizesAlone():
        trainer = Trainer(twin, device, parts(twin, device))
        with CostCounter() as counter, _FlopsByPhase(counter) as phases:
            trainer.train_step()
    flops = phases.seconds
    blocks = [list(block.parameters()) for block in trainer.student.blocks]
    inside = {id(weight) for block in blocks for weight in block}
    outside = [weight for weight in trainer.student.parameters() if id(weight) not in inside]
    points = trainer.source.samples_per_prompt
    micro_batches = math.ceil(points / (config.train.points_per_micro_batch or points)) * trainer.source.batches
    return Work(
        rollout=counter.flops - flops["forward"] - flops["backward"],
        forward=flops["forward"],
        backward=flops["backward"],
        micro_batches=micro_batches,
        units=[[tuple(weight.shape) for weight in unit] for unit in (outside, *blocks)],
    )
