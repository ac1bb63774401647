"""CLIP score: 100 times the cosine of an image and its caption in CLIP's space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm.errors import UserError

DEFAULT = "openai/clip-vit-large-patch14"


class Clip:
    """A CLIP model of transformers.

    Raises:
        UserError: it is not in that folder, or the hub cannot be reached.
    """

    def __init__(self, path_or_hub_id: str | None, device: torch.device) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.name, self.device = path_or_hub_id or DEFAULT, device
        try:
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(self.name)
            self._processor: Any = CLIPImageProcessor.from_pretrained(self.name)
            self._model: Any = CLIPModel.from_pretrained(self.name).to(device).eval().requires_grad_(False)
        except (OSError, ValueError, TypeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"no CLIP model in {self.name!r} ({reason}): give --clip a folder that transformers' save_pretrained"
                " wrote or a hub id that can be reached, or leave 'text' out of --metrics"
            ) from None

    @torch.no_grad()
    def scores(self, batches: Iterable[Tensor], captions: Sequence[str]) -> Tensor:
        """100 max(cosine, 0) of each image (batches of [B, 3, H, W] uint8) with its caption, [N] float32 on the CPU.

        Captions are cut at CLIP's 77 tokens.
        """
        scores, start = [], 0
        for images in batches:
            some = list(captions[start : start + len(images)])
            start += len(images)
            cosines = F.cosine_similarity(self._embed_images(images), self._embed_texts(some))
            scores.append(100 * cosines.clamp(min=0).float().cpu())
        return torch.cat(scores)

    def _embed_images(self, images: Tensor) -> Tensor:
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self._processor(images=pictures, return_tensors="pt").pixel_values.to(self.device)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        embedded: Tensor = self._model.visual_projection(pooled)
        return embedded

    def _embed_texts(self, captions: list[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self._model.text_model(**tokens.to(self.device)).pooler_output
        embedded: Tensor = self._model.text_projection(pooled)
        return embedded
