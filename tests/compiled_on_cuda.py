"""What inductor makes of the fused operators for a GPU, in a process of its own: python tests/compiled_on_cuda.py OUT

Writes OUT/compiled.json: of a student's block, of attention under torch.func.jvp and of the operators outside networks,
the texts of the generated modules, how often a run of each calls what, and what PyTorch complained of; of the first two
also where their modules' arguments come from.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from pretended_cuda import compile_device, pretend

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    pretend(compile_device())  # before torch is imported
    from pretended_launches import compile_nothing, pretend_launches

    pretend_launches()
    compile_nothing()

import torch
from pretended_launches import launched
from speed.block import StudentBlock, generated_code
from tbcm_kernels.ahead import tensors
from tbcm_kernels.catalog import size_of
from tbcm_kernels.registry import OPERATORS
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.nn import functional

from tbcm.models.differentiation.explicit import Differentiable


class Attention:
    """Torch's attention with its derivative, forward and backward, as networks of other families call it."""

    def __init__(self, *, device: str = "cuda") -> None:
        def tokens() -> Tensor:  # heads apart as a projection leaves them
            return torch.empty(1, 20, 2, 16, device=device).transpose(1, 2)

        self.values = {name: tokens().requires_grad_() for name in ("q", "k", "v")}
        self.tangents = {name: tokens() for name in ("dq", "dk", "dv")}
        self.gradient = tokens()

    def tensors(self) -> dict[str, Tensor]:
        return {**self.values, **self.tangents, "gradient": self.gradient}

    def differentiated(self, values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        with Differentiable():
            y, dy = torch.func.jvp(functional.scaled_dot_product_attention, values, tangents)
        return y, dy.detach()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The value, whose gradients are in the leaves' `grad`, and its tangent."""
        y, dy = self.differentiated(tuple(self.values.values()), tuple(self.tangents.values()))
        y.backward(self.gradient)
        return y, dy


def compiled_attention() -> Attention:
    step = Attention()
    step.differentiated = torch.compile(step.differentiated, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    return step


def with_sources(step: StudentBlock | Attention) -> dict[str, Any]:
    """Launches of a compiled step, forward and backward, and where its modules' arguments come from: a tensor of the
    step by its name, or one that the first module returned by its number."""
    names = {x.data_ptr(): name for name, x in step.tensors().items()}
    sources: list[list[str]] = []
    compile_to_module = GraphLowering.compile_to_module

    def compiled(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        call = module.call

        def recorded(arguments: list[torch.Tensor]) -> Any:
            sources.append([names.get(x.data_ptr(), "?") for x in arguments])
            results = call(arguments)
            names.update(
                {x.data_ptr(): str(i) for i, x in enumerate(results) if x is not None and x.data_ptr() not in names}
            )
            kept.append(results)
            return results

        module.call = recorded
        return module

    kept: list[Any] = []  # so that no address is used again
    GraphLowering.compile_to_module = compiled  # type: ignore[method-assign]
    step()
    GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]
    before = launched()
    step()
    return {"launches": launched() - before, "sources": sources[:2]}


def operators() -> dict[str, Any]:
    """Those of a rollout's step, the tangent and the loss, compiled, with the loss's gradients."""
    size = size_of("sana-600m", points=2, pixels=128)
    count = 0
    for name in ("trigflow_step", "tangent", "consistency_loss"):
        arguments = OPERATORS[name].inputs(size, torch.float32, torch.device("cuda"), False)
        run = torch.compile(OPERATORS[name].run, fullgraph=True, dynamic=False)
        before = launched()
        for y in tensors(run(*arguments)):
            if y.requires_grad:
                y.backward()
        count += launched() - before
    return {"launches": count}


def recorded(run: Any) -> dict[str, Any]:
    with generated_code() as made:
        facts = run()
    modules = [{"text": code.text, "called": code.called, "backward": code.backward} for code in made]
    return facts | {"modules": modules}


class Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record.getMessage())


if __name__ == "__main__":
    complaints = Complaints()
    logging.getLogger("torch._higher_order_ops").addHandler(complaints)
    found = {
        "block": recorded(lambda: with_sources(StudentBlock("tiny", 2, 1, 4, text=5))),
        "attention": recorded(lambda: with_sources(compiled_attention())),
        "operators": recorded(operators),
        "complaints": complaints.all,
    }
    (FOLDER / "compiled.json").write_text(json.dumps(found))
