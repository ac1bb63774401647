"""Measuring photographs and the like: generated images against real ones (Inception) and their captions (CLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from tbcm.config.resolution import Size
from tbcm.data.captions import digest
from tbcm.data.images import CaptionedImages
from tbcm.evaluation.clip import Clip
from tbcm.evaluation.distances import fid, kid, split
from tbcm.evaluation.generated import read
from tbcm.evaluation.inception import Inception
from tbcm.evaluation.stored import Tensors, sha256, stored
from tbcm.inference.images import to_uint8

_BATCH = 32  # images that are in memory at once


class PhotographJudge:
    """KID and FID to a reference on Inception features, and the CLIP score: those for which a network is given.

    Args:
        reference: the real images, all of which are compared with; where `inception` is given.
        folder: where they are.
        size: of real and generated images.
        cache: where the reference's features are kept. They are known by folder, captions and size: after replacing
            images in place, remove them.
    """

    def __init__(
        self,
        reference: CaptionedImages | None,
        folder: Path | None,
        size: Size,
        *,
        inception: Inception | None,
        clip: Clip | None,
        cache: Path,
    ) -> None:
        self.reference, self.folder, self.size, self.cache = reference, folder, size, cache
        self.inception, self.clip = inception, clip

    def __call__(self, files: Sequence[Path], captions: Sequence[str]) -> dict[str, float]:
        """Of generated images: kid (1e3 x KID) and fid; clip_score, its mean, and clip_score_wrong, the mean with the
        next image's caption."""
        found: dict[str, float] = {}
        if self.inception:
            features = self.inception(self._batches(files, "Inception"))
            found |= {"kid": 1e3 * kid(features, self.real), "fid": fid(features, self.real)}
        if self.clip:
            own, wrong = self.clip.scores(self._batches(files, "CLIP"), captions)
            found |= {"clip_score": own.mean().item(), "clip_score_wrong": wrong.mean().item()}
        return found

    def floor(self) -> dict[str, float]:
        """kid and fid between two disjoint halves of the real images, `n` each."""
        if not self.inception:
            return {}
        one, other = split(self.real, len(self.real) // 2)
        return {"n": len(one), "kid": 1e3 * kid(one, other), "fid": fid(one, other)}

    @cached_property
    def real(self) -> Tensor:
        """Features of the real images, [N, 2048]."""
        assert self.inception is not None and self.reference is not None and self.folder is not None
        reference, inception = self.reference, self.inception

        def batches() -> Iterator[Tensor]:
            indices = range(len(reference))
            for start in tqdm(indices[::_BATCH], desc="Inception of real images", unit="batch", disable=None):
                yield to_uint8(reference.images(indices[start : start + _BATCH], self.size))

        def make() -> Tensors:
            return {"features": inception(batches())}

        made_from = {
            "folder": str(self.folder.resolve()),
            "captions": digest(reference.captions),
            "size": self.size,
            "inception": sha256(inception.file),
        }
        return stored(self.cache, "real", made_from, make)["features"]

    def _batches(self, files: Sequence[Path], what: str) -> Iterator[Tensor]:
        for start in tqdm(range(0, len(files), _BATCH), desc=what, unit="batch", disable=None, leave=False):
            yield read(files[start : start + _BATCH], self.size)
