"""What is compared: ways to take the same training step, each a configuration one change away from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tbcm_kernels.catalog import SANA
from tbcm_kernels.registry import OPERATORS

from tbcm.config import Config, parse_config

MODELS: dict[str, dict[str, Any]] = {
    "sana-600m": {"resolution": 1024, "text": {"encoder": "gemma2", "max_tokens": 300}},
    "sana-1600m": {"resolution": 1024, "text": {"encoder": "gemma2", "max_tokens": 300}},
    "icons": {"resolution": 64, "teacher": {"null_mask": "own"}, "text": {"encoder": "minilm", "max_tokens": 16}},
    "tiny": {"resolution": 64, "teacher": {"null_mask": "own"}, "text": {"encoder": "minilm", "max_tokens": 16}},
}


@dataclass(frozen=True)
class Arm:
    """A way to take a step: `what` it changes, as overrides section.key -> value, in the arm that it is `based_on`;
    fused operators that it does `without` (None: as that one)."""

    name: str
    what: str
    change: dict[str, Any]
    based_on: str | None = None
    without: tuple[str, ...] | None = None


_PUBLISHED = {
    "student.tangent": "two_pass",
    "student.derivative": "jvp",
    "student.checkpointing": "full",
    "student.compile": False,
    "teacher.compile": False,
    "teacher.cuda_graph": False,
    "teacher.half_weights": False,
    "text.once": False,
}
ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "published",
            "our re-implementation of the published way: two passes by torch.func.jvp, text for every point, full"
            " recompute, fp32 teacher under autocast, eager, none of our kernels",
            _PUBLISHED | {"optimizer.fused": False},
            without=tuple(OPERATORS),
        ),
        Arm("one_pass", "value and tangent in one pass", {"student.tangent": "one_pass"}, "published"),
        Arm("dual", "hand-written tangents, no zero products", {"student.derivative": "dual"}, "one_pass"),
        Arm("text_once", "a prompt's keys and values once", {"text.once": True}, "dual"),
        Arm("half_weights", "teacher's weights in bf16", {"teacher.half_weights": True}, "text_once"),
        Arm("selective", "linear layers not recomputed", {"student.checkpointing": "selective"}, "half_weights"),
        Arm("no_recompute", "nothing recomputed", {"student.checkpointing": "none"}, "half_weights"),
        Arm("kernels", "our fused operators", {}, "no_recompute", ()),
        Arm("compiled", "blocks compiled", {"student.compile": True, "teacher.compile": True}, "kernels"),
        Arm("cuda_graph", "rollout as a CUDA graph", {"teacher.cuda_graph": True}, "compiled"),
        Arm("overlap", "next rollout beside the student", {"train.overlap_rollout": True}, "cuda_graph"),
        Arm("fused_update", "optimizer, clipping and EMA fused", {"optimizer.fused": "auto"}, "overlap"),
        Arm("fast", "all of the above: speed first", {}, "fused_update"),
        Arm(
            "lean",
            "fast, memory first: values recomputed, micro-batches of 3 points, text from a cache",
            {
                "student.checkpointing": "full",
                "train.points_per_micro_batch": 3,
                "train.overlap_rollout": False,
                "text.cache": "unused",
            },
            "fast",
        ),
    )
}
IN_SANA = [name for name, operator in OPERATORS.items() if set(SANA) & set(operator.models)]
KERNELS = {
    arm.name: arm
    for arm in (
        Arm("no_kernels", "PyTorch's operators for all fused ones", {}, "fast", tuple(OPERATORS)),
        *(Arm(f"without_{name}", f"PyTorch's operators for {name}", {}, "fast", (name,)) for name in IN_SANA),
    )
}
"""What the fused operators give, all and each."""

UPDATES = {
    arm.name: arm
    for arm in (
        Arm("came_plain", "CAME in PyTorch's operators", {"optimizer.fused": False}, "fast"),
        Arm("adamw", "AdamW, fused", {"optimizer.name": "adamw"}, "fast"),
        Arm("adamw_plain", "AdamW in PyTorch's operators", {"optimizer.fused": False}, "adamw"),
        Arm("fp8", "the teacher's large layers in fp8", {"teacher.fp8": True}, "fast"),
    )
}
"""What else is compared with `fast`."""

ON_CUDA_ONLY = {"half_weights", "kernels", "cuda_graph", "overlap", "fused_update", "fp8", *UPDATES, *KERNELS}
"""Arms whose change does nothing on a CPU, or cannot be there."""
ARMS |= UPDATES | KERNELS


def without(name: str) -> tuple[str, ...]:
    """The fused operators that an arm does without."""
    arm = ARMS[name]
    if arm.without is not None:
        return arm.without
    return without(arm.based_on) if arm.based_on else ()


def overrides(name: str, device: torch.device) -> dict[str, Any]:
    """Of an arm and all that it is based on."""
    arm = ARMS[name]
    below = overrides(arm.based_on, device) if arm.based_on else {}
    return below if device.type == "cpu" and name in ON_CUDA_ONLY else below | arm.change


def config(model: str, arm: str, method: str, samples: int, points: int, device: torch.device) -> Config:
    """`samples` optimised in a step: prompts with `points` - 1 points each (tbcm), or as many images (scm, sprint). A
    GPU's teacher rolls out all prompts at once, and its student takes one after another."""
    each = points - 1 if method == "tbcm" else 1
    if samples % each and samples > each:
        raise ValueError(f"{samples} samples are no whole number of prompts with {each} points")
    prompts = max(1, samples // each)
    base, route = MODELS[model], {"points": min(points, samples + 1), "per_prompt": True}
    tree: dict[str, Any] = {
        "out": "unused",
        "resolution": base["resolution"],
        "teacher": {"path": "unused", "architecture": model, **base.get("teacher", {})},
        "text": dict(base["text"]),
        "data": {"prompts": "unused", "images": "unused"},
        "method": {"name": method} | ({} if method != "tbcm" else {"route": route}),
        "optimizer": {"name": "came"},
        "train": {"prompts_per_step": prompts},
        "log": {"preview_every": 0},
    }
    if method == "tbcm" and device.type == "cuda" and prompts > 1:
        tree["train"]["prompts_per_micro_batch"] = 1
    for key, value in overrides(arm, device).items():
        if key == "text.cache" and method != "tbcm":
            continue  # which encodes captions
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree, f"{model}/{arm}")
