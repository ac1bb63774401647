"""A student's transformer block as compiled code: what inductor made of it, without weights or data that matter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import UserDefinedTritonKernel

from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.presets import SANA


@dataclass
class Code:
    """A module that inductor made."""

    text: str
    backward: bool
    bytes: int
    """What one run moves: of each kernel and product, every tensor that it is given once."""
    called: Counter[str] = field(init=False)
    """How often one run calls each kernel and operator."""

    def __post_init__(self) -> None:
        body = self.text[self.text.index("def call(") :]
        calls = re.findall(r"(\w+)\.run\(|(?:extern_kernels|torch\.ops)\.([\w.]+)\(", body)
        self.called = Counter(kernel or operator for kernel, operator in calls)

    @property
    def ours(self) -> int:
        """Launches of this package's kernels."""
        return sum(count for name, count in self.called.items() if "_kernel" in name)

    @property
    def fused(self) -> int:
        """Launches of kernels that inductor wrote."""
        return sum(count for name, count in self.called.items() if name.startswith("triton_"))

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(count for name, count in self.called.items() if name.split(".")[0] in ("mm", "addmm", "bmm"))

    @property
    def operators(self) -> int:
        """Calls of other operators, through Python and PyTorch's dispatcher."""
        return self.called.total() - self.ours - self.fused - self.products


@contextmanager
def generated_code() -> Iterator[list[Code]]:
    """Inside, what inductor makes goes into the list that is yielded."""
    made: list[Code] = []
    codegen: Any = GraphLowering.codegen

    def kept(graph: GraphLowering) -> Any:
        result = codegen(graph)
        text = result[0] if isinstance(result[0], str) else result[0].value
        made.append(Code(text, graph.is_backward, _bytes(graph)))
        return result

    GraphLowering.codegen = kept  # type: ignore[method-assign, assignment]
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield made
    finally:
        GraphLowering.codegen = codegen  # type: ignore[method-assign]


THIRDS = {
    "_scale_kernel": 1,
    "_state_kernel": 2,
    "_output_kernel": 1,
    "_query_backward_kernel": 1,
    "_scale_backward_kernel": 2,
    "_key_backward_kernel": 2,
}
"""How many of queries, keys and values, which lie side by side, a kernel of linear attention takes."""


def _bytes(graph: GraphLowering) -> int:
    """As inductor counts them; of a kernel of ours, what is written is among what it is given."""
    return sum(
        _of_ours(node) if isinstance(node.node, UserDefinedTritonKernel) else node.get_read_write_buffers_sizes()
        for node in graph.scheduler.nodes
    )


def _of_ours(node: Any) -> int:
    sizes = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False).values()
    kernel: Any = kernel_side_table.get_kernel(node.node.kernel_idx)
    thirds = THIRDS.get(kernel.fn.__name__, 3)
    return sum(size * thirds // 3 if size == max(sizes) else size for size in sizes)


class StudentBlock:
    """One block, value and tangent, forward and backward, under autocast to bf16: of `samples` images of rows x rows
    tokens. Called, it is compiled and run; its tensors hold nothing that matters.
    """

    def __init__(
        self, model: str, samples: int, prompts: int, rows: int, *, text: int = 300, device: str = "cuda"
    ) -> None:
        with torch.device(device):
            backbone = SanaTransformer2DModel(**SANA[model] | {"guidance_embeds": True, "num_layers": 1})
            self.network = SanaTrigFlow(backbone, timestep_scale=1.0, compiled=True)
            width, tokens = self.network.width, rows * rows
            self.given = {
                "h": torch.empty(samples, tokens, width, requires_grad=True),
                "dh": torch.empty(samples, tokens, width),
                "modulation": torch.empty(samples, 6 * width, dtype=torch.bfloat16, requires_grad=True),
                "dmodulation": torch.empty(samples, 6 * width, dtype=torch.bfloat16),
                "text": torch.empty(prompts, text, width, requires_grad=True),
                "bias": torch.zeros(prompts, 1, text),
            }
            self.gradient = torch.empty(samples, tokens, width)
        self.size, self.device = (rows, rows), device

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The value, whose gradients are in the leaves' `grad`, and its tangent."""
        h, dh, modulation, dmodulation, text, bias = self.given.values()
        with torch.autocast(self.device, torch.bfloat16):
            block = self.network.backbone.transformer_blocks[0]
            y, dy = self.network._block(block, (h, dh), (modulation, dmodulation), text, bias, self.size)
        y.backward(self.gradient)
        assert dy is not None
        return y, dy

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it reads, by name: of its weights, and of `given`."""
        block = self.network.backbone.transformer_blocks[0]
        return {**dict(block.named_parameters()), **self.given, "gradient": self.gradient}
