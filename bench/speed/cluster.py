"""The tables of `scaling.py --predict`: the model's answers for a cluster, with all that they assume."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import append, table
from tqdm import tqdm

from speed.collectives import KINDS
from speed.scaling_model import MODES, Cluster, Work, predict, traffic, work_of
from tbcm.config import load_config
from tbcm.errors import UserError
from tbcm.training.dryrun import as_on_a_gpu

RECIPE = Path(__file__).parents[2] / "configs" / "sana.yaml"
MODELS = "sana-600m", "sana-1600m"
SAMPLES = 1, 5, 15, 60
NETWORKS = 400.0, 50.0, 12.5, 3.125
"""GB/s of a node: eight adapters of 400 Gb/s, one of them, one of 100 Gb/s, one of 25 Gb/s."""
COLUMNS = {
    "model": "model",
    "mode": "mode",
    "step_ms": "ms a step",
    "compute_ms": "of it computation",
    "exposed_ms": "exposed communication",
    "efficiency": "efficiency",
    "collectives": "collectives",
    **{f"{kind}_gb": f"{kind.replace('_', '-')}, GB" for kind in KINDS},
}
_DEFAULTS = {
    "nodes": (4, "nodes"),
    "gpus": (8, "GPUs of a node"),
    "peak": (989.0, "TFLOP/s of a GPU in bf16, without sparsity (H100 SXM data sheet)"),
    "utilisation": (0.35, "of that rate; an assumption: on a CPU a step ran at 0.28 to 0.39 of the matmul rate"),
    "nvlink": (450.0, "GB/s from a GPU to the others of its node (H100 data sheet: 900 in both directions together)"),
    "network": (400.0, "GB/s from a node (DGX H100 data sheet: eight adapters of 400 Gb/s)"),
    "achieved": (0.7, "of these two; an assumption"),
    "latency": (50.0, "microseconds of each collective; an assumption"),
    "overlap": (0.8, "of a pass behind which its communication can hide; an assumption"),
}
_SHARES = "utilisation", "achieved", "overlap"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--predict", "the model's assumptions")
    for name, (value, what) in _DEFAULTS.items():
        group.add_argument(f"--{name}", type=type(value), default=value, help=f"{what} (default: {value:g})")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """
    Raises:
        UserError: a number that cannot be.
    """
    for name in _DEFAULTS:
        value, share = getattr(arguments, name), name in _SHARES
        if value <= 0 or (share and value > 1):
            raise UserError(f"--{name} {value:g}: should be above 0" + " and at most 1" * share)
    giga = 1e9 * arguments.achieved
    return Cluster(
        arguments.nodes,
        arguments.gpus,
        flops=1e12 * arguments.peak * arguments.utilisation,
        nvlink=giga * arguments.nvlink,
        network=giga * arguments.network,
        latency=1e-6 * arguments.latency,
        overlap=arguments.overlap,
    )


def main(arguments: argparse.Namespace) -> None:
    """Prints the tables and appends the first one's rows."""
    cluster = cluster_of(arguments)
    assumed = {name: getattr(arguments, name) for name in _DEFAULTS}
    bar = tqdm(MODELS, desc="counting FLOPs", unit="model", disable=None)
    works = {model: recipe(model) for model in bar}
    rows = [
        append("scaling", _row(model, mode, work, cluster) | {"assumed": assumed}, arguments.out)
        for model, work in works.items()
        for mode in MODES
    ]
    print(f"A MODEL of {cluster.nodes} nodes x {cluster.gpus} GPUs, not a measurement. It assumes:\n")
    print("\n".join(f"* {name} {assumed[name]:g}: {what}" for name, (_, what) in _DEFAULTS.items()))
    work = works[MODELS[0]]
    print(f"* the recipe of {RECIPE.name}: a prompt of 15 samples on each rank, in {work.micro_batches} micro-batches")
    print("* and what bench/speed/scaling_model.py says is not in it\n")
    print(table(rows, {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}))
    print(f"\nEfficiency of ddp, {MODELS[0]}, against samples of a rank and the network of a node:\n")
    heads = {"samples": "samples", **{f"{rate:g}": f"{rate:g} GB/s" for rate in NETWORKS}}
    print(table([_efficiencies(work, samples, cluster, arguments.achieved) for samples in SAMPLES], heads))


def recipe(model: str) -> Work:
    """A rank's step of the published recipe: one prompt of 15 samples."""
    config = load_config(RECIPE, [f"teacher.architecture={model}", "train.prompts_per_step=1"])
    return work_of(as_on_a_gpu(config))


def _row(model: str, mode: str, work: Work, cluster: Cluster) -> dict[str, Any]:
    predicted = predict(mode, work, cluster)
    sent = traffic(mode, work, cluster.ranks, cluster.gpus if mode == "hsdp" else cluster.ranks)
    return {
        "model": model,
        "modelled": True,
        "ranks": cluster.ranks,
        "mode": mode,
        "tflop": work.flops / 1e12,
        "step_ms": 1000 * predicted.step,
        "compute_ms": 1000 * predicted.compute,
        "exposed_ms": 1000 * predicted.exposed,
        "efficiency": predicted.efficiency,
        "collectives": sum(one.calls for one in sent.values()),
        **{f"{kind}_gb": one.bytes / 1e9 for kind, one in sent.items()},
    }


def _efficiencies(work: Work, samples: int, cluster: Cluster, achieved: float) -> dict[str, float]:
    """By network. The recipe's micro-batches have 5 samples."""
    scaled = work.times(samples / 15, math.ceil(samples * work.micro_batches / 15))
    return {"samples": samples} | {
        f"{rate:g}": predict("ddp", scaled, replace(cluster, network=1e9 * rate * achieved)).efficiency
        for rate in NETWORKS
    }
