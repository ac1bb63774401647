"""Files that an evaluation reads, in miniature: real images, and networks with random weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer


def write_mjhq(folder: Path, count: int = 6, size: int = 40) -> Path:
    """Image i is grey, of value 40 i."""
    rows = {}
    for i in range(count):
        category = ("animals", "people")[i % 2]
        (folder / category).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), 40 * i, np.uint8)).save(folder / category / f"id{i}.jpg")
        rows[f"id{i}"] = {"category": category, "prompt": f" a grey thing, number {i} "}
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


class RandomInception(nn.Module):
    """The interface of the published file: uint8 images of any size, features or logits."""

    def __init__(self, features: int = 2048) -> None:
        super().__init__()
        self.project = nn.Linear(48, features)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        features = self.project(pooled)
        return features if return_features else features[:, :1008]


def write_inception(file: Path, features: int = 2048) -> Path:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        torch.jit.script(RandomInception(features)).save(str(file))
    return file


def write_clip(folder: Path) -> Path:
    """A CLIP of a few thousand parameters with a tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**small, **tokens, "vocab_size": len(words), "max_position_embeddings": 12},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder
