"""What an evaluation says: where and with what it was made, and its values as a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import tbcm
from tbcm.runtime.commit import commit

SPEED = {
    "throughput": "images/s at the batch, without text and decoding",
    "throughput_decoded": "images/s at the batch, with decoding",
    "latency": "seconds for one image, without text and decoding",
    "latency_decoded": "seconds for one image, with decoding",
    "text_throughput": "prompts/s through the text encoder at the batch",
    "text_latency": "seconds for one prompt through the text encoder",
}
UNITS = {
    "kid": "1e3 x KID to the real images (unbiased)",
    "fid": "FID to the real images (biased upwards: compare at equal numbers of images)",
    "kid_heldout": "1e3 x KID of the samples of held-out combinations to real images of these",
    "kid_to_teacher": "1e3 x KID to the teacher's 20-step samples (their guidance: the default one, not --guidance)",
    "fid_to_teacher": "FID to the teacher's 20-step samples (the same ones)",
    "concept": "share of images whose drawing a classifier names as asked for",
    "foreground": "share with the foreground that was asked for, by the pixels",
    "background": "the same of the background",
    "style": "the same of solid or outline",
    "concept_heldout": "concept, of combinations that nobody trained on",
    "foreground_heldout": "foreground, of these",
    "background_heldout": "background, of these",
    "style_heldout": "style, of these",
    "coverage": "share of real drawings of a concept in a style that samples of it come near",
    "recall": "share of these that lie among the samples",
    "clip_score": "mean of 100 x cosine of image and own caption in CLIP's space",
    "clip_score_wrong": "the same with another image's caption",
    "agreement_error": "mean of |latent - teacher's from the same noise|^2 / Var (0: the same; 2: unrelated)",
    "agreement_spread": "its standard deviation over prompts",
    "agreement_n": "prompts it is of",
    **SPEED,
    **{f"{name}_p{share}": f"{share} % quantile of {name}" for name in SPEED for share in (20, 80)},
}


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, machine and date."""
    packages = ("torch", "diffusers", "transformers")
    return {
        "tbcm": tbcm.__version__,
        "commit": commit(),
        **{package: importlib.metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def table(report: Mapping[str, Any]) -> str:
    """A line for each value but quantiles, a column for each number of steps, and the floor's values below."""
    results: Sequence[Mapping[str, Any]] = report["results"]
    names = [name for name in UNITS if name in results[0] and not name.endswith(("_p20", "_p80"))]
    width = max(map(len, [*names, *(report["floor"] or [""])]))
    lines = [f"{'steps':<{width}}" + "".join(f"{row['steps']:>11}" for row in results)]
    for name in names:
        lines.append(f"{name:<{width}}" + "".join(f"{row[name]:>11.4g}" for row in results) + f"   {UNITS[name]}")
    if report["floor"]:
        lines += ["", "to read them beside (kid and fid: two disjoint halves of the real images, n each):"]
        lines += [f"{name:<{width}}{value:>11.4g}" for name, value in report["floor"].items()]
    return "\n".join(lines)
