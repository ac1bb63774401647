"""Real drawings of icons as a reference: what a drawing shows, and how much of a group of drawings others reach.

All on features of the drawing in black on white: its colours say nothing of what it shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from tbcm.evaluation.concepts import Classifier
from tbcm.evaluation.diversity import NEIGHBOURS, coverage, recall
from tbcm.evaluation.efficientnet import features
from tbcm.evaluation.stored import stored
from tbcm.icons.captions import Catalogue
from tbcm.icons.dataset import Drawings, chance

FEATURES = "efficientnet-lite0"
_CHUNK = 64


class RealDrawings:
    """The shipped drawings. `made_from` names them in `cache`, where their features are kept; None: nowhere."""

    def __init__(self, drawings: Drawings, made_from: str, cache: Path | None, device: torch.device | str) -> None:
        self.drawings, self.made_from, self.cache, self.device = drawings, made_from, cache, torch.device(device)
        self.groups = Catalogue(drawings.entries).groups
        """Indices of the drawings of a concept in a style, those of the unseen sets among them."""

    def features_of(self, masks: Tensor, what: str = "features of drawings") -> Tensor:
        """Of masks [n, 64, 64] uint8: [n, 1280]."""
        return with_progress((255 - masks)[:, None].expand(-1, 3, -1, -1), what, self.device)

    @cached_property
    def features(self) -> Tensor:
        """Of all drawings, [drawings, 1280]."""

        def make() -> dict[str, Tensor]:
            return {"features": self.features_of(self.drawings.masks, "features of all drawings")}

        return stored(self.cache, "drawings", {"drawings": self.made_from, "features": FEATURES}, make)["features"]

    @cached_property
    def classifier(self) -> Classifier:
        """Names concepts; trained on the drawings of the sets that are trained on."""
        seen = [i for i, entry in enumerate(self.drawings.entries) if not entry.unseen]
        return Classifier.fit(self.features[seen], [self.drawings.entries[i].concept for i in seen])

    def accuracy(self) -> dict[str, float]:
        """concept: the classifier's accuracy on the `n` drawings of the unseen sets."""
        unseen = [i for i, entry in enumerate(self.drawings.entries) if entry.unseen]
        named = self.classifier.names(self.features[unseen])
        hits = [name == self.drawings.entries[i].concept for name, i in zip(named, unseen, strict=True)]
        return {"concept": fmean(hits), "n": len(unseen)}

    def diversity(self, asked: Sequence[tuple[str, str]], shapes: Tensor | None) -> dict[str, float]:
        """coverage and recall of real drawings, means over concepts in a style; {} if none was asked for often enough.

        Args:
            asked: concept and style of each image.
            shapes: features [n, 1280] of the images' drawings; None: of as many real drawings in their place. These
                are never among those that are to be reached.
        """
        rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, group in enumerate(asked):
            rows[group].append(i)
        values = []
        for group, images in rows.items():
            order = sorted(self.groups[group], key=lambda i: chance("split", self.drawings.entries[i].key))
            count = min(len(images), len(order) // 2)
            if count > NEIGHBOURS:
                fake = self.features[order[:count]] if shapes is None else shapes[images[:count]]
                real = self.features[order[count:]]
                values.append((coverage(real, fake), recall(real, fake)))
        if not values:
            return {}
        return {"coverage": fmean(value for value, _ in values), "recall": fmean(value for _, value in values)}


def with_progress(images: Tensor, what: str, device: torch.device) -> Tensor:
    """Features [n, 1280] of images [n, 3, H, W] uint8, with a progress bar."""
    parts = []
    with tqdm(total=len(images), desc=what, unit="image", disable=None, leave=False) as progress:
        for some in images.split(_CHUNK):
            parts.append(features(some, device=device))
            progress.update(len(some))
    return torch.cat(parts)
