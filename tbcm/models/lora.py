"""LoRA students: low-rank adapters of peft on a backbone whose weights are the teacher's own.

How teacher and student share one backbone in memory: the student's modules are a second tree over the *same*
parameters (`tied`), and peft puts its adapters into that tree alone. So the teacher is the network without them,
always: nothing is switched, and what depends on a module's class or hooks stays apart - compiled and captured graphs,
checkpointing, and the hooks of FSDP and DDP. What is shared is frozen, and kept as the teacher keeps it (half
precision, perhaps); adapters and what is new beside them (guidance embedding, log-variance head) are fp32. FSDP shards
what is trained and leaves the rest whole, as the teacher needs it (`tbcm.runtime.parallel`). An fp8 teacher has, of its
large layers, copies in fp8 beside the shared weights. Optimiser, EMA and checkpoints know the trained weights only; to
sample or to export, the adapters are added to the weights (`merge`), and the network is one like any other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tbcm_kernels.catalog import Dual
from torch import Tensor, nn

from tbcm.config.sections import Lora
from tbcm.errors import UserError, first_line, shown
from tbcm.models.differentiation.dual import dual, dual_rule, pointwise, pointwise_rule

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora as peft_lora
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise UserError(f"student.lora needs peft ({first_line(error)}): pip install tbcm[lora]") from None

_NAME = "default"
"""peft's for the one adapter."""

DEFAULT_TARGETS = (
    r".*\.(to_[qkv]|to_out\.0|to_out|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj"  # attention
    r"|(ff|ff_context|ffn|img_mlp|txt_mlp)\.net\.(0\.proj|2)|(ff|ff_context|feed_forward)\.\w+)"  # feed-forward
    r"|single_transformer_blocks\.\d+\.proj_(mlp|out)"  # FLUX's both in one
)
"""The projections of attention and the layers of feed-forward networks, under the names that diffusers has for them."""


def tied(backbone: Any) -> Any:
    """The same modules once more, on the same parameters and buffers, without the hooks on them."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    twin = copy.deepcopy(backbone, shared)
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


def add_lora(backbone: nn.Module, lora: Lora, leave_out: Sequence[str] = ()) -> None:
    """Puts adapters into a frozen backbone, in place: y = W x + b + (alpha / rank) B A x, with B = 0 at first.

    Args:
        leave_out: names of layers that cannot have one.

    Raises:
        UserError: targets that match no layer.
    """
    there = [name for name, layer in backbone.named_modules() if _takes_adapter(layer) and name not in leave_out]
    names = matching(lora.targets or DEFAULT_TARGETS, there, type(backbone).__name__)
    alpha: Any = lora.alpha or lora.rank  # peft says int, and divides it
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules="|".join(map(re.escape, names)),  # a regular expression: each name whole
    )
    with torch.device("meta"):  # peft would make them on the CPU and round them to the frozen weights' dtype
        inject_adapter_in_model(config, backbone)
    for layer in adapted(backbone).values():
        device = layer.get_base_layer().weight.device
        for part in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            part.weight = nn.Parameter(torch.empty(part.weight.shape, dtype=torch.float32, device=device))
        layer.reset_lora_parameters(_NAME, init_lora_weights=True)
        layer.cast_input_dtype_enabled = False  # autocast does it


def matching(targets: str | Sequence[str], there: Sequence[str], where: str) -> list[str]:
    """Of the layers' names `there` those that `targets` mean to peft: a regular expression of whole names, or a list of
    names or of their ends. Raises UserError where one matches nothing."""
    if isinstance(targets, str):
        try:
            found = [name for name in there if re.fullmatch(targets, name)]
        except re.error as error:
            raise UserError(f"student.lora.targets = {shown(targets)}: no regular expression ({error})") from None
        lacking: Any = None if found else targets
    else:
        hits = {target: [name for name in there if f".{name}".endswith(f".{target}")] for target in targets}
        found = [name for name in there if any(name in hit for hit in hits.values())]
        lacking = next((target for target, hit in hits.items() if not hit), None)
    if lacking is not None:
        kinds = sorted({re.sub(r"^(.*?[A-Za-z_]{5,}\.\d+\.)+", "", name) for name in there})
        raise UserError(
            f"student.lora.targets: {shown(lacking)} matches no layer of {where}; give names, their ends or one regular"
            f" expression of whole names such as {there[0]}. There are: {', '.join(kinds[:60])}"
        )
    return found


def adapted(net: nn.Module) -> dict[str, Any]:
    """peft's layers, by name."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, BaseTunerLayer)}


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Adds the adapters to the weights and takes peft's layers out, in place. The teacher of these weights is then no
    longer what it was."""
    for name, layer in adapted(net).items():
        base = layer.get_base_layer()
        base.weight.add_(layer.get_delta_weight(_NAME).to(base.weight.dtype))
        net.set_submodule(name, base)


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and (alpha / rank) B."""
    return layer.lora_A[_NAME].weight, layer.scaling[_NAME] * layer.lora_B[_NAME].weight


def state_of(backbone: nn.Module, shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters as diffusers loads them, with alpha / rank in B so that they count once for every reader. `shifts`
    [width] are constants behind layers, by name: adapters' biases, of which then all have one."""
    layers = adapted(backbone)
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys((*layers, *shifts)):
        layer: Any = backbone.get_submodule(name)
        if name in layers:
            a, b = factors(layer)
        else:
            rank = next(iter(layers.values())).r[_NAME]
            a, b = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if shifts:
            state[f"{name}.lora_B.bias"] = shifts.get(name, torch.zeros(len(b)))
    return {name: value.detach().contiguous() for name, value in state.items()}


def _takes_adapter(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


# On dual numbers. Both parts are linear, so that an adapter is a layer beside a layer for value and tangent alike.


@dual_rule(peft_lora.Linear)
def _linear(layer: Any, x: Dual) -> Dual:
    return _sum(dual(layer.base_layer, x), dual(layer.lora_B[_NAME], dual(layer.lora_A[_NAME], x)), layer)


@pointwise_rule(peft_lora.Conv2d)
def _pointwise(layer: Any, x: Dual) -> Dual:
    added = pointwise(layer.lora_B[_NAME], pointwise(layer.lora_A[_NAME], x))
    return _sum(pointwise(layer.base_layer, x), added, layer)


def _sum(base: Dual, added: Dual, layer: Any) -> Dual:
    scale = layer.scaling[_NAME]
    y = (base[0] + scale * added[0]).to(base[0].dtype)
    if base[1] is None or added[1] is None:
        return y, None
    with torch.no_grad():
        return y, (base[1] + scale * added[1]).to(base[1].dtype)
