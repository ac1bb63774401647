"""Which drawings a caption leaves open, and the exact mean of the velocity over them.

At x_s = (1 - s) xbar_0 + s e, flow matching regresses on e - xbar_0 = (x_s - xbar_0)/s, and what it converges to is
the mean of that over all (xbar_0, e) that lead to x_s. Over a finite group of latents c_k with prior p_k that mean is
known: xbar_0 = c_k has the posterior weight w_k ~ p_k exp(-|x_s - (1 - s) c_k|^2/(2 s^2)), so that the target
(x_s - sum_k w_k c_k)/s has no variance but that of x_s itself (Xu et al. 2023, "stable target field").
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tbcm.icons.captions import STYLES, Catalogue, Prompt, caption, wordings
from tbcm.icons.colours import PAIRS
from tbcm.icons.dataset import Drawing

MISSING: dict[tuple[str, ...], float] = {
    (): 0.66,
    ("style",): 0.10,
    ("fg",): 0.07,
    ("bg",): 0.10,
    ("fg", "bg"): 0.04,
    ("style", "fg", "bg"): 0.03,
}
"""What a caption leaves out, and how often."""

MOST = 1024  # latents of a group: of a larger one the plain target is taken, which is as unbiased


@dataclass(frozen=True)
class Group:
    """Rows of the latents [n * pairs, D] that a caption allows, and the log of how often each is drawn for it (up to
    a constant)."""

    rows: Tensor
    log_prior: Tensor


def mean_latent(x: Tensor, s: Tensor, latents: Tensor, log_prior: Tensor) -> Tensor:
    """E[xbar_0 | x_s = x] for xbar_0 among `latents` [K, D] with `log_prior` [K]; x [D], s a scalar in (0, 1]."""
    away = (x - (1 - s) * latents).square().sum(1)
    weights = torch.softmax(log_prior - away / (2 * s * s), 0)
    return weights @ latents


class Sampler:
    """Draws (latent row, prompt) pairs for training, never a held-out combination: a style of a concept, then one of
    its drawings, then a colour pair, each evenly; then what the caption leaves out, whatever was drawn."""

    def __init__(self, entries: Sequence[Drawing]) -> None:
        self.catalogue = Catalogue(entries)
        self.pairs: dict[tuple[str, str], list[int]] = {}  # colour pairs of a concept in a style that may be trained on
        for concept, style in self.catalogue.groups:
            allowed = [i for i, (fg, _) in enumerate(PAIRS) if not self.catalogue.is_held_out(concept, style, fg)]
            if allowed:
                self.pairs[concept, style] = allowed
        self.keys = sorted(self.pairs)

    def draw(self, rng: random.Random) -> tuple[int, Prompt]:
        """A latent row and the prompt it is shown with."""
        concept, style = rng.choice(self.keys)
        pair = rng.choice(self.pairs[concept, style])
        drawing = rng.choice(self.catalogue.groups[concept, style])
        (missing,) = rng.choices(list(MISSING), list(MISSING.values()))
        fg, bg = PAIRS[pair]
        return drawing * len(PAIRS) + pair, Prompt(concept, style, fg, bg).without(missing)

    @cache  # noqa: B019 - one sampler a process
    def group(self, prompt: Prompt) -> Group | None:
        """What the prompt allows; None, if that is more than `MOST`."""
        rows: list[int] = []
        log_prior: list[float] = []
        for style in STYLES if prompt.style is None else (prompt.style,):
            drawings = self.catalogue.groups.get((prompt.concept, style), [])
            allowed = self.pairs.get((prompt.concept, style), [])
            pairs = [pair for pair in allowed if _fits(prompt, pair)]
            rows += [drawing * len(PAIRS) + pair for drawing in drawings for pair in pairs]
            log_prior += [-math.log(max(1, len(drawings) * len(allowed)))] * (len(drawings) * len(pairs))
        return Group(torch.tensor(rows), torch.tensor(log_prior)) if len(rows) <= MOST else None

    def prompts(self) -> list[Prompt]:
        """Every prompt that `draw` can give."""
        found = {
            Prompt(concept, style, *PAIRS[pair]).without(missing)
            for (concept, style), pairs in self.pairs.items()
            for pair in pairs
            for missing in MISSING
        }
        return sorted(found, key=lambda prompt: tuple(value or "" for value in vars(prompt).values()))


def _fits(prompt: Prompt, pair: int) -> bool:
    fg, bg = PAIRS[pair]
    return prompt.fg in (None, fg) and prompt.bg in (None, bg)


def captions_of(prompts: Sequence[Prompt]) -> dict[Prompt, list[str]]:
    """The captions that a prompt is trained with: two of a full one, the plain order among them, one of another."""
    return {
        prompt: [caption(prompt, wording) for wording in dict.fromkeys([0, *wordings(prompt)][:2])]
        if None not in vars(prompt).values()
        else [caption(prompt, wordings(prompt)[0])]
        for prompt in prompts
    }
