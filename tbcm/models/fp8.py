"""An optional fp8 teacher: the large matrix products of a frozen network in e4m3, weights and activations alike."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tbcm.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448

ENDS = ("patch_embed", "time_embed", "caption_projection", "norm_out", "proj_out")
"""What of a Sana backbone stays as it is: a few per cent of the FLOPs, and all blocks see their error."""


def fp8_available(device: torch.device) -> bool:
    """Whether `device` multiplies e4m3 matrices: an NVIDIA GPU of compute capability 8.9 (Ada) or later."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> contiguous e4m3 values [..., K] and fp32 scales [..., 1], x about values * scales.

    A row's largest magnitude becomes 448. e4m3 has 3 mantissa bits and subnormals 2^-9 apart, so rounding moves an
    element by at most max(2^-4 |x|, 2^-10 scale).
    """
    largest = x.abs().amax(-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros is not 0 / 0
    return (x / scale).to(E4M3, memory_format=torch.contiguous_format), scale


class Fp8Linear(nn.Module):
    """x W^T + b of a frozen layer, with W and x in e4m3: one scale per row of W and, found anew at each call, of x.

    Takes x [..., K] in any floating dtype to [..., N] in the same, rounded to bf16 on the way. It has no derivative.
    Move it to another device, but not to another dtype. Where there is no GPU, the same e4m3 operands are multiplied in
    fp32: slow, for tests.

    Args:
        weight: [N, K], both multiples of 16.
        bias: [N], kept in bf16.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, scale = quantise_rows(weight.detach())
        # Buffers: the network's parameters, and so its dtype, stay those of its other layers.
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.view(1, -1))
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
        y = _product(values, self.weight, scale, self.scale, self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class Fp8Pointwise(nn.Module):
    """A frozen 1 x 1 convolution, [B, C, H, W] -> [B, N, H, W] (channels-last), as an `Fp8Linear` over its pixels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = Fp8Linear(conv.weight.flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def to_fp8(net: nn.Module, *, skip: Collection[str] = ENDS, smallest: int = 512) -> dict[str, int]:
    """Replaces the large linear layers and 1 x 1 convolutions of a frozen network by fp8 ones, in place.

    Large: both sides are multiples of 16 and at least `smallest`. `skip` names attributes (of the network or of a part
    of it) that are left alone with all that is below them. Do it last: after loading, freezing and casting.

    Returns:
        The number of weights of each replaced layer, by its name.

    Raises:
        UserError: the network is on a GPU without fp8 (a CPU may emulate it), or has no such layer.
        ValueError: a layer is not frozen.
    """
    device = next(net.parameters()).device
    if device.type == "cuda" and not fp8_available(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later, not {name}: use bf16 instead")
    replaced = {}
    for name, layer in list(net.named_modules()):
        if not _is_large(layer, smallest) or not set(skip).isdisjoint(name.split(".")):
            continue
        if layer.weight.requires_grad:
            raise ValueError(f"{name} is not frozen, and fp8 layers have no gradient")
        fp8 = Fp8Linear(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else Fp8Pointwise(layer)
        net.set_submodule(name, fp8)
        replaced[name] = layer.weight.numel()
    if not replaced:
        raise UserError(f"no layer of the network is large enough for fp8 (both sides at least {smallest}): use bf16")
    return replaced


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """||approximate - exact|| / ||exact|| over all elements. Waits for the device."""
    return float((approximate.float() - exact.float()).norm() / exact.float().norm())


def _is_large(layer: nn.Module, smallest: int) -> bool:
    # Exactly these types: a subclass may do more than its weight and bias say.
    if type(layer) is nn.Linear:
        sides = layer.weight.shape
    elif type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1:
        sides = layer.weight.shape[:2]
    else:
        return False
    return all(side >= smallest and side % 16 == 0 for side in sides)


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    """scale_a scale_b (a b^T) + bias in bf16: a [M, K], b [N, K], scale_a [M, 1], scale_b [1, N], bias [N]."""
    if a.is_cuda:
        # Fast accumulation keeps about 13 bits of the sums: less is lost there than by the 3 bits of the operands.
        return torch._scaled_mm(
            a, b.t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    y = (a.float() @ b.float().t()) * scale_a * scale_b  # torch 2.11's _scaled_mm has no row scales on a CPU
    return (y if bias is None else y + bias).bfloat16()
