"""Features of photographs: the Inception network that published FIDs and KIDs are on.

It is taken as the TorchScript file that the metrics of StyleGAN, EDM and clean-fid use, which holds the 2015 network
with its own resizing and needs PyTorch alone. The libraries that rebuild the network (torch-fidelity, pytorch-fid)
import torchvision, and its builds for CUDA, which pip installs, fail to import beside a PyTorch for CPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError, first_line

URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FILE = URL.rpartition("/")[2]


class Inception:
    """The network. `file`: where it is kept, the `path` given or torch's own cache, into which it is downloaded. Its
    hash is not checked, only that it maps images to 2,048 features; reports have the hash.

    Raises:
        UserError: the file is missing, cannot be downloaded, or is no such network.
    """

    def __init__(self, path: str | None, device: torch.device) -> None:
        self.file, self.device = _file(path), device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what the file is
                self._network: Any = torch.jit.load(str(self.file), map_location=device).eval()
            with torch.no_grad():
                shape = tuple(self._features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{self.file}: is not the Inception network of {URL} ({first_line(error)})") from None
        if shape != (1, 2048):
            raise UserError(f"{self.file}: its features are {list(shape)}, not [1, 2048]: give the network of {URL}")

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor]) -> Tensor:
        """Batches of images [B, 3, H, W] uint8 -> features [N, 2048] float32 on the CPU."""
        return torch.cat([self._features(images).float().cpu() for images in batches])

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self._network(images.to(self.device), return_features=True)
        return features


def _file(path: str | None) -> Path:
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: no such file; download {URL}")
        return Path(path)
    file = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file))
        except OSError as error:
            raise UserError(
                f"FID and KID need Inception's weights, and {URL} cannot be reached ({error}): download it elsewhere"
                " and give --inception PATH, or leave 'distance' out of --metrics"
            ) from None
    return file
