"""Measuring emoji: sets of generated images against the shipped real ones and against the teacher's own samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tbcm.emoji.dataset import read_atlas
from tbcm.evaluation.alignment import RidgeMap, alignment
from tbcm.evaluation.distances import fid, kid, split
from tbcm.evaluation.efficientnet import features
from tbcm.evaluation.stored import key, sha256, stored, teacher_origin
from tbcm.generation import Sampler
from tbcm.models.text import MiniLMEncoder

TEACHER_STEPS, TEACHER_SEED = 20, 2**31 - 1
"""Of the samples that students are compared with: a seed that nobody gives a student."""
FEATURES = "efficientnet-lite0"
RIDGE = 1.0  # of 0.1 to 100 the one with the highest cosine on held-out real images
REAL_IMAGES = 2400  # that are shipped
_ASSETS = Path(str(resources.files("tbcm.emoji") / "assets"))
_CHUNK = 64


class EmojiJudge:
    """Measures sets of generated emoji against real images and against the teacher's own many-step samples.

    All distances are on EfficientNet-Lite0 features: they compare runs of this package with each other and with
    `floor`, not with published values. KID is unbiased; FID is biased upwards, the more the fewer images: compare it
    at equal `images` only. What is expensive is made when it is first asked for.

    The teacher's samples (20 steps, the middle guidance of its configuration) have noise of their own, so that a
    student is compared with the teacher's distribution and not with the very samples.

    Args:
        teacher: a Sampler of the teacher (`teacher=True`).
        images: how many images each set has, 2 to 2,400.
        cache: where the teacher's samples and the real images' features are kept, which take minutes on a CPU; None:
            nowhere. A file's name tells what it was made from.
        device: where features are computed.
    """

    prompts: list[str]
    """The captions of `images` of the real images, evenly spread over them: what to generate images for."""

    def __init__(
        self, teacher: Sampler, images: int, *, cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if not 2 <= images <= REAL_IMAGES:
            raise ValueError(f"images is {images}; give 2 to {REAL_IMAGES}")
        rows = json.loads((_ASSETS / "real.json").read_text(encoding="utf-8"))["images"]
        self.captions = [row["caption"] for row in rows]
        self.held_out = torch.tensor([row["held_out"] for row in rows])
        chosen = spread(images, len(rows))
        self.prompts = [self.captions[i] for i in chosen]
        self._unseen = self.held_out[chosen]  # of `prompts`, which have held-out captions
        self.teacher, self.cache, self.device = teacher, cache, torch.device(device)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """`distances` and, of those of the images whose captions are held out (none, if these are fewer than two),

        text_cosine: with the own caption, in the space of MiniLM's sentence embeddings, to which a ridge map fitted on
            the real images that are not held out brings the images' features; text_cosine_wrong: with the others'
            captions; text_top1: the share whose own caption is the nearest of these (by chance 1 / n).
            Compare them at equal n, and with `text_floor`.
        """
        found = self._features(images)
        return {**self._distances(found), **self._alignment(found)}

    def text(self, images: Tensor) -> dict[str, float]:
        """Of these alone what is in `text_*`."""
        return self._alignment(self._features(images))

    def distances(self, images: Tensor) -> dict[str, float]:
        """Of images [n, 3, 64, 64] uint8 for `prompts`, in their order:

        kid, fid: to the real images (twice as many as there are prompts, or all 2,400); KID times 1e3.
        kid_to_teacher, fid_to_teacher: to the teacher's samples of the same prompts.
        kid_heldout: of the samples for held-out captions to the held-out real images, on which nothing was trained
            (absent, if these are fewer than two).
        """
        return self._distances(self._features(images))

    def floor(self) -> dict[str, float]:
        """What to read `distances` beside.

        kid, fid: between two disjoint halves of the real images, `n` each. They are what a perfect generator has (FID:
            at this n, not at that of the sets).
        teacher_kid, teacher_fid: of the teacher's samples to the real images.
        """
        one, other = split(self.real, len(self.real) // 2)
        return {
            "n": len(one),
            "kid": 1e3 * kid(one, other),
            "fid": fid(one, other),
            "teacher_kid": 1e3 * kid(self.teacher_features, self.real),
            "teacher_fid": fid(self.teacher_features, self.real),
        }

    def text_floor(self) -> dict[str, float]:
        """What to read `text_*` beside: teacher_text_* of the teacher's samples, and heldout_text_* of the `heldout_n`
        held-out real images, of which the ridge map has seen neither image nor caption."""
        unseen = [caption for caption, held_out in zip(self.captions, self.held_out, strict=True) if held_out]
        teacher = self._alignment(self.teacher_features)
        heldout = self._aligned(self._all_real[self.held_out], unseen)
        return {
            **{f"teacher_{name}": value for name, value in teacher.items()},
            **{f"heldout_{name}": value for name, value in heldout.items()},
            "heldout_n": len(unseen),
        }

    @cached_property
    def real(self) -> Tensor:
        """Features of the real images that sets are compared with, [min(2 images, 2400), 1280]."""
        return self._real_features(self._real_indices)

    @property
    def _real_indices(self) -> list[int]:
        count = len(self.captions)
        return spread(min(2 * len(self.prompts), count), count)

    @property
    def teacher_images(self) -> Tensor:
        """The teacher's samples of `prompts`, [n, 3, 64, 64] uint8."""
        return self._teacher["images"]

    @property
    def teacher_features(self) -> Tensor:
        """Their features [n, 1280]."""
        return self._teacher["features"]

    def _features(self, images: Tensor) -> Tensor:
        if len(images) != len(self.prompts):
            raise ValueError(f"{len(images)} images for {len(self.prompts)} prompts")
        return features(images, device=self.device)

    def _distances(self, found: Tensor) -> dict[str, float]:
        distances = {
            "kid": 1e3 * kid(found, self.real),
            "fid": fid(found, self.real),
            "kid_to_teacher": 1e3 * kid(found, self.teacher_features),
            "fid_to_teacher": fid(found, self.teacher_features),
        }
        unseen, unseen_real = found[self._unseen], self.real[self.held_out[self._real_indices]]
        if min(len(unseen), len(unseen_real)) >= 2:
            distances["kid_heldout"] = 1e3 * kid(unseen, unseen_real)
        return distances

    def _alignment(self, found: Tensor) -> dict[str, float]:
        """Of the samples for held-out captions: images and captions that the map was fitted on would flatter who
        repeats them."""
        captions = [self.prompts[i] for i in self._unseen.nonzero().flatten().tolist()]
        return self._aligned(found[self._unseen], captions) if len(captions) >= 2 else {}

    def _aligned(self, found: Tensor, captions: list[str]) -> dict[str, float]:
        own, others, top = alignment(self._map.images(found), self._map.texts(self._embed(captions)))
        return {"text_cosine": own, "text_cosine_wrong": others, "text_top1": top}

    @cached_property
    def _all_real(self) -> Tensor:
        return self._real_features(range(len(self.captions)))

    def _real_features(self, indices: Sequence[int]) -> Tensor:
        """A demo with few images does not wait for those of all 2,400, which only the map to text needs."""

        def make() -> dict[str, Tensor]:
            images = read_atlas(_ASSETS / "real.webp", len(self.captions))[list(indices)]
            return {"features": _features(images, "features of real images", self.device)}

        made_from = {"sha256": sha256(_ASSETS / "real.webp"), "indices": list(indices), "features": FEATURES}
        return stored(self.cache, "real", made_from, make)["features"]

    @cached_property
    def _teacher(self) -> dict[str, Tensor]:
        guidance = middle(self.teacher.config.method.guidance)

        def make() -> dict[str, Tensor]:
            images = generate(self.teacher, self.prompts, steps=TEACHER_STEPS, guidance=guidance, seed=TEACHER_SEED)
            return {"images": images, "features": _features(images, "features of its samples", self.device)}

        made_from = {
            **teacher_origin(self.teacher.pipeline, self.teacher.config, self.device),
            "guidance": guidance,
            "steps": TEACHER_STEPS,
            "seed": TEACHER_SEED,
            "images": len(self.prompts),
            "prompts": key({"prompts": self.prompts}),
            "features": FEATURES,
        }
        return stored(self.cache, "teacher", made_from, make)

    @cached_property
    def _map(self) -> RidgeMap:
        """Fitted on the real images that are not held out."""
        seen = ~self.held_out
        captions = [caption for caption, use in zip(self.captions, seen, strict=True) if use]
        return RidgeMap.fit(self._all_real[seen], self._embed(captions), RIDGE)

    @cached_property
    def _encoder(self) -> MiniLMEncoder:
        return MiniLMEncoder(16, self.device)

    def _embed(self, captions: list[str]) -> Tensor:
        """MiniLM's sentence embeddings: the mean of the tokens' states, normalised. [n, 384]."""
        means = []
        for start in range(0, len(captions), 256):
            states, mask = self._encoder.encode(captions[start : start + 256])
            weights = mask[..., None].float()
            means.append((states * weights).sum(1) / weights.sum(1))
        return F.normalize(torch.cat(means), dim=1).cpu()


def spread(count: int, of: int) -> list[int]:
    """`count` indices spread evenly over range(of)."""
    return [i * of // count for i in range(count)]


def middle(values: list[float]) -> float:
    """The guidance that a `Sampler` takes where none is given."""
    return sorted(values)[len(values) // 2]


def generate(sampler: Sampler, prompts: list[str], *, steps: int, guidance: float, seed: int) -> Tensor:
    """Images [n, 3, H, W] uint8, with a progress bar."""
    parts = []
    with tqdm(total=len(prompts), desc="teacher's samples", unit="image", disable=None, leave=False) as progress:
        for start in range(0, len(prompts), sampler.batch):
            some = prompts[start : start + sampler.batch]
            parts.append(sampler(some, steps=steps, guidance=guidance, seed=seed, first=start))
            progress.update(len(some))
    return torch.cat(parts)


def _features(images: Tensor, what: str, device: torch.device) -> Tensor:
    parts = []
    with tqdm(total=len(images), desc=what, unit="image", disable=None, leave=False) as progress:
        for some in images.split(_CHUNK):
            parts.append(features(some, device=device))
            progress.update(len(some))
    return torch.cat(parts)
