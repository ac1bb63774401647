"""A graph pass for torch.compile that removes the products with zero tangents from a forward-mode derivative.

The tangent of y = W x, W a weight, is W dx. `torch.func.jvp` nevertheless gives W a tangent, a tensor of zeros, and
computes dW x + W dx: three products where two are enough, about one forward pass of a network in vain. Inductor keeps
all three; that of torch 2.11 cannot even lower a convolution with such a weight: there a compiled jvp needs this pass.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims

# Constants: position of the value among the arguments (None: always zero).
_CONSTANTS: dict[Any, int | None] = {
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero, aten._efficientzerotensor)),
    **{aten.scalar_tensor: 0, aten.full: 1, aten.full_like: 1, aten.fill: 1, aten.new_full: 2},
}
# Zero where all their tensors are.
_MOVES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.permute, aten.transpose, aten.t, aten.unsqueeze),
    *(aten.squeeze, aten.alias, aten.detach, aten.clone, aten._to_copy, prims.convert_element_type, aten.slice),
    *(aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.cat, aten.stack, aten.neg, aten.sum),
    operator.getitem,
}
_SUMS = {aten.add, aten.sub}
_CONVOLUTIONS = (aten.convolution, aten._convolution)
# Zero where one of the factors is, but for a summand, the other of the first three arguments: positions of the factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.matmul, aten.linear, *_CONVOLUTIONS), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), (1, 2)),
}


def fold_options() -> dict[str, Any]:
    """The `options` of a torch.compile (backend inductor) that runs `fold_zero_operands` on this function alone."""
    return {"post_grad_custom_pre_pass": _PASS}


def fold_zero_operands(graph: Graph) -> int:
    """Removes in place the matrix products and convolutions that have an operand of constant zeros; returns how many.

    Zeros are known by structure: constants of the graph, their views, casts and concatenations, and products with
    them. Such a zero times inf or NaN is 0 here, deliberately: it stands for a derivative that does not exist, not for
    a number that happened to be 0. Sums with zeros become copies of the other summand where that has the dtype, shape
    and strides of the sum (copies, as an output must not alias an input: inductor removes those that are not needed).

    Nodes carry fake tensors in meta["val"], as those of inductor and AOTAutograd do; products of dynamic shape stay.
    A graph that writes to tensors, but for copies to its inputs, is left alone: a zero may not remain one there.
    """
    if any(_writes_elsewhere(node) for node in graph.nodes):
        return 0
    zeros, removed = set[Node](), 0
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", node.target)
        if _is_zero(node, packet, zeros):
            zeros.add(node)
        elif packet in _SUMS:
            _fold_sum(node, zeros)
        elif packet in _PRODUCTS and any(node.args[i] in zeros for i in _PRODUCTS[packet]) and _layout(node):
            summands = [x for i, x in enumerate(node.args[:3]) if i not in _PRODUCTS[packet]]
            _fold_product(node, packet, summands[0] if summands else None, zeros)
            removed += 1
    graph.eliminate_dead_code()
    if graph.owning_module is not None:
        graph.owning_module.recompile()
    return removed


def _is_zero(node: Node, packet: Any, zeros: set[Node]) -> bool:
    if packet in _CONSTANTS:
        position = _CONSTANTS[packet]
        return position is None or node.args[position : position + 1] == (0,)
    if packet in _MOVES:
        return bool(node.all_input_nodes) and zeros.issuperset(node.all_input_nodes)
    if packet in _SUMS:
        return all(summand in zeros for summand in node.args[:2])
    return packet is aten.mul and any(factor in zeros for factor in node.args[:2])


def _fold_sum(node: Node, zeros: set[Node]) -> None:
    """x + 0, 0 + x and x - 0, in place."""
    left, right = node.args[:2]
    if left in zeros and node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        left, right = right, left
    if right in zeros and isinstance(left, Node) and _layout(left) and _layout(left) == _layout(node):
        node.target, node.args, node.kwargs = aten.clone.default, (left,), {}


def _fold_product(node: Node, packet: Any, summand: Any, zeros: set[Node]) -> None:
    """Replaces a product that is zero by zeros, plus the bias (addmm: beta times its summand) where there is one."""
    graph, value, beta = node.graph, node.meta["val"], node.kwargs.get("beta", 1)
    with graph.inserting_before(node):
        result = _insert_zeros(graph, value)
        if summand is None or summand in zeros or beta == 0:
            zeros.add(result)
        else:
            if packet in _CONVOLUTIONS:  # [C] -> [C, 1, ...]
                shape, bias = [value.shape[1], *[1] * (value.dim() - 2)], summand
                summand = graph.call_function(aten.view.default, (bias, shape))
                summand.meta["val"] = bias.meta["val"].view(shape)
            result = graph.call_function(aten.add.Tensor, (result, summand), {} if beta == 1 else {"alpha": beta})
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)


def _insert_zeros(graph: Graph, value: Tensor) -> Node:
    """Zeros with the shape, dtype, device and order of dimensions in memory of `value`, a fake tensor."""
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    stored = value.permute(order)
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    result = graph.call_function(aten.full.default, ([*stored.shape], 0), options)
    result.meta["val"] = stored
    if order != sorted(order):
        result = graph.call_function(aten.permute.default, (result, [order.index(i) for i in range(value.dim())]))
        result.meta["val"] = value
    return result


def _layout(node: Node) -> tuple[Any, ...] | None:
    """What tensors share that can stand for each other; None where it is not known or depends on the input."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    sizes = (*value.shape, *value.stride())
    return (sizes, value.dtype, value.device) if all(isinstance(size, int) for size in sizes) else None


def _writes_elsewhere(node: Node) -> bool:
    """Whether an operator writes to a tensor, other than the copy to an input that a functional graph may end with."""
    writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return writes and not (node.target is aten.copy_.default and node.all_input_nodes[0].op == "placeholder")


class _FoldZeroOperands(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        fold_zero_operands(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))  # the compiler's cache forgets its graphs when this file changes


_PASS = _FoldZeroOperands()  # one for all: equal options share compiled code
