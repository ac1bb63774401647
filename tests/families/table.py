"""The table of docs/backbones.md, made from what the suite runs on: python tests/families/table.py

Costs are counted on the tiny networks, uncompiled, of value and tangent in one pass over those of a plain forward pass:
FLOPs, and bytes that are kept for the backward pass.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)] + [str(Path(__file__).parents[2] / "kernels")]

from families.test_students import W, prepared
from families.tiny import BUILDERS, make

from tbcm.errors import UserError
from tbcm.method.formulation import Diffusion, Edm, Formulation
from tbcm.models.embedders import fold_guidance
from tbcm.models.families.export import few_steps
from tbcm.models.network import DiffusersNetwork
from tbcm.training.accounting import CostCounter

DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"
BEGIN, END = "<!-- made by tests/families/table.py -->", "<!-- end -->"
HEADER = (
    "| tiny network | pipeline class | trained as | guidance | its student in plain diffusers | FLOPs | kept |",
    "|---|---|---|---|---|---|---|",
)


def trained_as(formulation: Formulation) -> str:
    if isinstance(formulation, Edm):
        return "EDM"
    if isinstance(formulation, Diffusion):
        return {"epsilon": "eps", "v_prediction": "v"}[formulation.prediction]
    return "flow"


def guidance_of(student: DiffusersNetwork) -> str:
    family = student.family
    if student.guidance_embedding is None:
        return "embedded"
    if not family.unguided:
        return "none"
    kinds = {"plain": "both branches", "from_given": "both, less 1", "renormed": "both, renormed"}
    return kinds[family.combine.__name__]


def export_of(name: str, student: DiffusersNetwork) -> str:
    try:
        few = few_steps(student.family, student.formulation, make(name).pipe.scheduler, 2)
    except UserError:
        return "not exported"
    told, alone = next((key for key in ("sigmas", "timesteps") if key in few.arguments), "num_inference_steps"), ""
    try:
        if student.guidance_embedding is not None:
            fold_guidance(student.backbone, student.guidance_embedding, W)
    except (UserError, ValueError):
        alone = ", of one guidance scale"
    return f"{type(few.scheduler).__name__}, `{told}=`{alone}"


def cost(call: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of a call, and bytes that its answer keeps alive: itself, and its graph's for the backward pass."""
    with CostCounter() as counter:
        answer = call()
        gc.collect()
        live = counter.live
    del answer
    return counter.flops, live


def row(name: str) -> str:
    student, condition, u, t = prepared(name, torch.float32)
    w, tangents = torch.full((4,), W), (torch.randn_like(u), torch.ones_like(t))

    def plain() -> object:
        return student(u, t, condition, w)

    def one_pass() -> object:
        return student(u, t, condition, w, tangents)

    costs = [f"{a / b:.1f}" for a, b in zip(cost(one_pass), cost(plain), strict=True)]
    cells = [
        name,
        student.family.pipeline,
        trained_as(student.formulation),
        guidance_of(student),
        export_of(name, student),
        *costs,
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    return "\n".join([*HEADER, *map(row, sorted(BUILDERS))])


def written(text: str) -> tuple[str, str, str]:
    """The document before, in and after the table."""
    before, rest = text.split(BEGIN + "\n")
    inside, after = rest.split("\n" + END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = written(DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
