"""Samples of a list of prompts, kept batch by batch: made by several ranks, and not again after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tbcm
from tbcm.config.resolution import Size
from tbcm.data.captions import digest
from tbcm.data.decoding import decode_file
from tbcm.evaluation.stored import Tensors, key, stored
from tbcm.inference.generation import Sampler
from tbcm.inference.images import save_png
from tbcm.runtime import distributed
from tbcm.runtime.files import write_json


class Generated:
    """What a sampler makes of `prompts` with these settings, kept below `folder`, which all ranks must see.

    Sample i depends on (prompt i, seed, i) alone, to rounding, whoever makes it and in whichever batch. A folder is
    known by settings, prompts, `identity`, this package's version, precision and kind of device (CPU or CUDA), so that
    what was made otherwise is not taken for what is asked for. What is not seen: changed code of one version, other
    versions of PyTorch, another GPU. After such a change, remove the folder.

    Args:
        identity: what tells the sampler's weights and the meaning of its inputs from others'
            (`tbcm.evaluation.candidates`).
    """

    def __init__(
        self,
        sampler: Sampler,
        identity: Mapping[str, Any],
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        folder: Path,
    ) -> None:
        self.sampler, self.prompts = sampler, list(prompts)
        self.settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed}
        self.made_from = {
            **identity,
            **self.settings,
            "prompts": digest(prompts),
            "count": len(self.prompts),
            "tbcm": tbcm.__version__,
            "device": next(sampler.net.parameters()).device.type,
            "precision": str(sampler.dtype).removeprefix("torch."),
        }
        self._name = f"{steps}-step-{key(self.made_from)}"
        self._images, self._latents = folder / "images" / self._name, folder / "latents" / self._name

    def images(self) -> list[Path]:
        """One PNG a prompt, in their order. Every rank calls it."""
        files = [self._images / f"{i:06d}.png" for i in range(len(self.prompts))]

        def is_there(start: int, stop: int) -> bool:
            return all(file.is_file() for file in files[start:stop])

        def make(start: int, stop: int) -> None:
            images = self.sampler(self.prompts[start:stop], first=start, **self.settings)
            for file, image in zip(files[start:stop], images, strict=True):
                save_png(image, file)

        distributed.run_on_main(lambda: write_json(self._images / "made_from.json", self.made_from))
        share_out(len(files), self.sampler.batch, is_there, make, f"images, {self._steps}")
        return files

    def latents(self) -> Tensor:
        """Scaled latents [P, C, h, w] fp32, in the prompts' order. Every rank calls it."""

        def batch(start: int, stop: int) -> Tensors:
            def make() -> Tensors:
                return {"latents": self.sampler.latents(self.prompts[start:stop], first=start, **self.settings).cpu()}

            return stored(self._latents, f"{start:06d}-{stop:06d}", self.made_from, make)

        count, size = len(self.prompts), self.sampler.batch
        share_out(count, size, lambda start, stop: False, batch, f"latents, {self._steps}")
        return torch.cat([batch(*part)["latents"] for part in _parts(count, size)])

    @property
    def _steps(self) -> str:
        steps = self.settings["steps"]
        return f"{steps} step" + "s" * (steps > 1)


def share_out(
    count: int, batch: int, is_there: Callable[[int, int], bool], make: Callable[[int, int], object], what: str
) -> None:
    """Calls `make(start, stop)` for each batch of range(count) that is not there, on one of the ranks; returns when all
    are made. Every rank calls it."""
    todo = distributed.run_on_main(lambda: [part for part in _parts(count, batch) if not is_there(*part)])
    mine = todo[distributed.rank() :: distributed.world_size()]
    with tqdm(mine, desc=what, unit="batch", disable=None if distributed.is_main() else True, leave=False) as progress:
        for part in progress:
            make(*part)
    distributed.barrier()


def read(files: Sequence[Path], size: Size) -> Tensor:
    """Image files of this size as [N, 3, *size] uint8."""
    return torch.stack(list(map(partial(decode_file, size=size), files)))


def _parts(count: int, batch: int) -> list[tuple[int, int]]:
    return [(start, min(start + batch, count)) for start in range(0, count, batch)]
