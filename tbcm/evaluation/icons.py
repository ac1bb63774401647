"""Measuring icons: sets of generated images against real drawings and against the teacher's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tbcm.evaluation.distances import fid, kid
from tbcm.evaluation.drawings import FEATURES, RealDrawings, with_progress
from tbcm.evaluation.efficientnet import features
from tbcm.evaluation.pixels import read_icons
from tbcm.evaluation.stored import key, sha256, stored, teacher_origin
from tbcm.icons.autoencoder import decode, encode
from tbcm.icons.bundle import worded
from tbcm.icons.captions import Catalogue, Prompt
from tbcm.icons.colours import PAIRS, colours_of, compose, fixed_jitter
from tbcm.icons.dataset import chance, load_drawings
from tbcm.inference.generation import Sampler
from tbcm.inference.images import to_uint8

TEACHER_STEPS, TEACHER_SEED = 20, 2**31 - 1
"""Of the samples that students are compared with: a seed that nobody gives a student."""
MOST_IMAGES = 4000
_ASSETS = Path(str(resources.files("tbcm.icons") / "assets"))


class IconJudge:
    """Measures sets of generated icons against real ones and against the teacher's own many-step samples.

    All distances are on EfficientNet-Lite0 features: they compare runs of this package with each other and with
    `floor`, not with published values. KID is unbiased; FID is biased upwards, the more the fewer images: compare it
    at equal `images` only. What is expensive is made when it is first asked for.

    The teacher's samples (20 steps, the middle guidance of its configuration) have noise of their own, so that a
    student is compared with the teacher's distribution and not with the very samples.

    Args:
        teacher: a Sampler of the teacher (`teacher=True`).
        images: how many images each set has, 2 to 4,000.
        cache: where the teacher's samples and the features of real drawings are kept, which take minutes on a CPU;
            None: nowhere. A file's name tells what it was made from.
        device: where features are computed.
    """

    prompts: list[str]
    """Captions that name everything, of trained and of held-out combinations in their natural shares: what to generate
    images for."""

    def __init__(
        self, teacher: Sampler, images: int, *, cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if not 2 <= images <= MOST_IMAGES:
            raise ValueError(f"images is {images}; give 2 to {MOST_IMAGES}")
        self.drawings = load_drawings(_ASSETS)
        seen = Catalogue([entry for entry in self.drawings.entries if not entry.unseen])
        held_out = set(seen.full(held_out=True))
        possible = sorted([*seen.full(held_out=False), *held_out], key=lambda prompt: chance("judged", worded(prompt)))
        self.asked: list[Prompt] = possible[:images]
        self.prompts = [worded(prompt) for prompt in self.asked]
        self._unseen = torch.tensor([prompt in held_out for prompt in self.asked])
        self._drawn = RealDrawings(self.drawings, sha256(_ASSETS / "drawings.webp"), cache, device)
        self.teacher, self.cache, self.device = teacher, cache, torch.device(device)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """`distances` and `text`."""
        return {**self.distances(images), **self.text(images)}

    def distances(self, images: Tensor) -> dict[str, float]:
        """Of images [n, 3, 64, 64] uint8 for `prompts`, in their order:

        kid, fid: to real images, two for each prompt; KID times 1e3.
        kid_to_teacher, fid_to_teacher: to the teacher's samples of the same prompts.
        kid_heldout: of the samples of held-out combinations to real images of these (absent, if there are fewer than
            two).
        """
        found = self._features(images)
        distances = {
            "kid": 1e3 * kid(found, self.real),
            "fid": fid(found, self.real),
            "kid_to_teacher": 1e3 * kid(found, self.teacher_features),
            "fid_to_teacher": fid(found, self.teacher_features),
        }
        if self._unseen.sum() >= 2:
            distances["kid_heldout"] = 1e3 * kid(found[self._unseen], self.real[self._unseen.repeat(2)])
        return distances

    def text(self, images: Tensor) -> dict[str, float]:
        """How well the images show what the captions say, and how much of it:

        concept: the share whose drawing a classifier names as asked for, which was trained on real drawings;
            foreground, background, style: the share that has these, by its pixels.
        concept_heldout and so on: the same of held-out combinations alone (absent, if there are none).
        coverage, recall: of real drawings, within a concept and a style, on features of the drawing alone (absent, if
            no such group has more than three images).
        """
        if len(images) != len(self.prompts):
            raise ValueError(f"{len(images)} images for {len(self.prompts)} prompts")
        reading = read_icons(images)
        shapes = self._drawn.features_of(reading.masks)
        right = {
            "concept": self._drawn.classifier.names(shapes),
            "foreground": reading.foregrounds,
            "background": reading.backgrounds,
            "style": reading.styles,
        }
        asked = {"concept": "concept", "foreground": "fg", "background": "bg", "style": "style"}
        found: dict[str, float] = {}
        for what, answers in right.items():
            hits = [answer == getattr(prompt, asked[what]) for answer, prompt in zip(answers, self.asked, strict=True)]
            found |= _shares(what, torch.tensor(hits), self._unseen)
        return found | self._drawn.diversity(self._groups_asked, shapes)

    def floor(self) -> dict[str, float]:
        """What to read `distances` beside.

        kid, fid: between two sets of real images for the same prompts. They are what a perfect generator has.
        teacher_kid, teacher_fid: of the teacher's samples to the real images.
        """
        one, other = self.real.chunk(2)
        return {
            "n": len(one),
            "kid": 1e3 * kid(one, other),
            "fid": fid(one, other),
            "teacher_kid": 1e3 * kid(self.teacher_features, self.real),
            "teacher_fid": fid(self.teacher_features, self.real),
        }

    def autoencoder_floor(self) -> dict[str, float]:
        """autoencoder_kid, autoencoder_fid: of one of the two sets of real images, encoded and decoded, to the other.
        No teacher on these latents can be better."""
        vae = self.teacher.pipeline.load_vae(torch.float32)
        again = to_uint8(decode(vae, encode(vae, self._real_images[: len(self.prompts)])))
        found, other = with_progress(again, "features of decoded images", self.device), self.real[len(self.prompts) :]
        return {"autoencoder_kid": 1e3 * kid(found, other), "autoencoder_fid": fid(found, other)}

    def text_floor(self) -> dict[str, float]:
        """What to read `text` beside: real_* of real drawings that the classifier has not seen, of `real_n` in the
        unseen sets and, for coverage and recall, of as many drawings as there are images; teacher_* of the teacher's
        samples."""
        own = {**self._drawn.accuracy(), **self._drawn.diversity(self._groups_asked, None)}
        teacher = self.text(self.teacher_images)
        return {
            **{f"real_{name}": value for name, value in own.items()},
            **{f"teacher_{name}": value for name, value in teacher.items()},
        }

    @cached_property
    def real(self) -> Tensor:
        """Features [2 n, 1280] of the real images: one for each prompt, then another for each."""
        made_from = {
            "drawings": sha256(_ASSETS / "drawings.webp"),
            "prompts": key({"prompts": self.prompts}),
            "features": FEATURES,
        }

        def make() -> dict[str, Tensor]:
            return {"features": with_progress(self._real_images, "features of real images", self.device)}

        return stored(self.cache, "real", made_from, make)["features"]

    @property
    def _groups_asked(self) -> list[tuple[str, str]]:
        return [(prompt.concept, str(prompt.style)) for prompt in self.asked]

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

    @cached_property
    def _real_images(self) -> Tensor:
        chosen = [self._two_drawings(prompt) for prompt in self.asked]
        drawn = torch.tensor([first for first, _ in chosen] + [second for _, second in chosen])
        pairs = torch.tensor([PAIRS.index((str(prompt.fg), str(prompt.bg))) for prompt in self.asked]).repeat(2)
        jitter = fixed_jitter(self.drawings.entries)[drawn, pairs]
        return compose(self.drawings.masks[drawn], colours_of(pairs, jitter))

    def _two_drawings(self, prompt: Prompt) -> tuple[int, int]:
        group = self._drawn.groups[prompt.concept, str(prompt.style)]
        order = sorted(group, key=lambda i: chance(worded(prompt), self.drawings.entries[i].key))
        return order[0], order[min(1, len(order) - 1)]

    @cached_property
    def _teacher(self) -> dict[str, Tensor]:
        guidance = middle(self.teacher.config.method.guidance)

        def make() -> dict[str, Tensor]:
            images = generate(self.teacher, self.prompts, steps=TEACHER_STEPS, guidance=guidance, seed=TEACHER_SEED)
            return {"images": images, "features": with_progress(images, "features of its samples", self.device)}

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


def _shares(name: str, hits: Tensor, unseen: Tensor) -> dict[str, float]:
    """Of all, and of the unseen ones if there are any."""
    shares = {name: hits.float().mean().item()}
    return shares | ({f"{name}_heldout": hits[unseen].float().mean().item()} if unseen.any() else {})


def spread(count: int, of: int) -> list[int]:
    """`count` indices spread evenly over range(of)."""
    return [i * of // count for i in range(count)]


def middle(values: Sequence[float]) -> float:
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
