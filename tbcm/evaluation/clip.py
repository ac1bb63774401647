"""CLIP score: 100 times the cosine of an image and its caption in CLIP's space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbcm.errors import UserError, first_line

DEFAULT = "openai/clip-vit-large-patch14"


class Clip:
    """A CLIP model of transformers.

    Raises:
        UserError: it is not in that folder, the hub cannot be reached, or transformers lacks a package for it.
    """

    def __init__(self, path_or_hub_id: str | None, device: torch.device) -> None:
        self.name, self.device = path_or_hub_id or DEFAULT, device
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

            self._tokenizer: Any = CLIPTokenizer.from_pretrained(self.name)
            self._processor: Any = CLIPImageProcessor.from_pretrained(self.name)
            self._model: Any = CLIPModel.from_pretrained(self.name).to(device).eval().requires_grad_(False)
        except ImportError as error:
            raise UserError(
                f"the CLIP score cannot be had with these packages ({first_line(error)}): install what is missing, or"
                " leave 'text' out of --metrics"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"no CLIP model in {self.name!r} ({first_line(error)}): give --clip a folder that transformers'"
                " save_pretrained wrote or a hub id that can be reached, or leave 'text' out of --metrics"
            ) from None

    @torch.no_grad()
    def scores(self, batches: Iterable[Tensor], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """100 max(cosine, 0) of each image (batches of [B, 3, H, W] uint8) with its caption, and with the next one's
        (the last image: with the first's): [N] float32 each, on the CPU.

        Captions are cut at CLIP's 77 tokens.
        """
        embedded, start = [], 0
        for images in batches:
            some = list(captions[start : start + len(images)])
            start += len(images)
            embedded.append((self._embed_images(images).float().cpu(), self._embed_texts(some).float().cpu()))
        pictures, texts = map(torch.cat, zip(*embedded, strict=True))
        own, wrong = (F.cosine_similarity(pictures, each) for each in (texts, texts.roll(-1, 0)))
        return 100 * own.clamp(min=0), 100 * wrong.clamp(min=0)

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
