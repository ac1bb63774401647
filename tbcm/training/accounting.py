"""Counting what a step costs: the FLOPs of its operators and the bytes of its live tensors."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tbcm.errors import UserError


class SizesAlone(FakeTensorMode):
    """Inside, tensors have sizes and no data. Only what has data and is no state or weight keeps it, and so does what
    follows from such alone: integers (a prompt's ids, masks and lengths, of which networks ask how long a text is) and
    single numbers (FakeTensorMode has its own way to keep those; torch 2.13 may crash where it frees them)."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(value, FakeTensor) for value in args):  # as most have one, without a longer look
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            if tensors and all(map(_keeps_data, tensors)):
                return func(*args, **kwargs)
        self.cache_enabled = func is not _OF_A_STORAGE
        return super().__torch_dispatch__(func, types, args, kwargs)


_OF_A_STORAGE = torch.ops.aten._new_zeros_with_same_feature_meta.default
"""Makes storage (for a tangent) as large as another's, which FakeTensorMode's cache of answers does not tell apart."""


def _keeps_data(value: Tensor) -> bool:
    return not isinstance(value, FakeTensor) and (value.numel() == 1 or not value.is_floating_point())


class CostCounter(TorchDispatchMode):
    """Counts, from the moment it is entered: `flops` (2 per multiply-add of matrix products, convolutions and
    attention), `live` bytes of tensor storage, and their `peak`.

    Works on fake and meta tensors, which have sizes but no memory. Workspaces inside an operator and an allocator's
    fragmentation are not counted. (PyTorch's own FlopCounterMode fails under torch.func.jvp without gradients,
    overcounts the backward pass of grouped convolutions and passes over what it does not know, a CPU's attention among
    it, so this is a plain dispatch mode.)

    Raises:
        UserError: an operator that multiplies matrices and has no formula here, or that is another package's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device, very often
            return func(*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():
            with self:  # in inference mode operators arrive here that are made of others
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, out)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_scaled_mm_v2"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"), 1),
}
"""Products, and where among the arguments the two factors begin."""
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}
"""With (input, weight, bias, stride, padding, dilation, transposed, ...)."""
_PLAIN_CONVOLUTIONS = {"cudnn_convolution", "mkldnn_convolution", "_slow_conv2d_forward", "_conv_depthwise2d"}
"""With (input, weight, ...), never transposed."""
_MULTIPLIES = re.compile(
    r"(^|_)(\w*mm|\w*mv|v?dot|matmul|linear|einsum|\w*gemm|cdist|trilinear|conv([123]d)?|convolution|attention|rnn|lstm|gru)_"
)
"""In the name of an operator that should have a formula."""
_NAMESPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "fsdp"}
"""PyTorch's own, in which an operator without a formula is known by its name."""


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """2 per multiply-add of one operator's call that returned `out`; 0 for what multiplies no matrices."""
    packet = func._overloadpacket
    name = packet.__name__.rstrip("_")  # an operation in place is the same
    if func.namespace == "tbcm" and name in _OURS:
        return _OURS[name](*args)
    if func.namespace not in _NAMESPACES:
        raise UserError(
            f"the FLOPs of {func} cannot be counted: count those of PyTorch's own operators (TBCM_KERNELS=off)"
        )
    if name in _FACTORS:
        return _product(*args[_FACTORS[name] :][:2])
    if name.startswith("_scaled_dot_product_"):
        return _attention_backward(*args[:4]) if name.endswith("_backward") else _attention(*args[:3])
    if name in _CONVOLUTIONS:
        return _convolution(args[0], args[1], out, transposed=args[6])
    if name in _PLAIN_CONVOLUTIONS:
        return _convolution(args[0], args[1], out, transposed=False)
    if name == "convolution_backward":
        grad, x, weight, *_, transposed, _, _, wanted = args
        return _convolution(x, weight, grad, transposed=transposed) * sum(
            wanted[:2]
        )  # of input and weight, as much each
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if _MULTIPLIES.search(f"{name}_"):
        raise UserError(f"the FLOPs of {func} cannot be counted: tbcm/training/accounting.py has no formula for it")
    return 0


def _product(a: Tensor, b: Tensor) -> int:
    """Of [..., n, k] and [..., k, m], or [k]."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of [..., heads, T, dim]: scores and their product with the values, of all pairs whether or not a mask hides them.
    Keys and values may have fewer heads, each for several of the queries."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    """The scores once more, then gradients of scores, values, queries and keys: three products over the width of the
    keys, two over that of the values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _dual_attention(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, *_: object
) -> int:
    """With a tangent each product has one more for each factor that has one; the scores' has if `dq` is given."""
    scores, values = (1 + (dq is not None) + (dx is not None) for dx in (dk, dv))
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (scores * q.shape[-1] + values * v.shape[-1])


_OURS: dict[str, Callable[..., int]] = {
    f"{way}attention{of}": formula
    for way in ("", "fused_")
    for of, formula in (("", _dual_attention), ("_backward", _attention_backward))
}
"""Operators that a network calls whatever TBCM_KERNELS says: attention with a tangent, in both its ways."""


def _convolution(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> int:
    """`weight` [out, in / groups, ...], or transposed [in, out / groups, ...]."""
    return 2 * math.prod((x if transposed else out).shape) * math.prod(weight.shape[1:])
