"""What the teacher is trained on, computed once: latents of every drawing in every colour pair, and text states.

Both lie in memory-mapped fp16 files beside the drawings; each is made anew when what it was made from has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor
from tqdm import tqdm

from tbcm.icons.autoencoder import encode
from tbcm.icons.colours import PAIRS, colours_of, compose, fixed_jitter
from tbcm.icons.dataset import Drawings
from tbcm.models.text import MiniLMEncoder
from tbcm.runtime.files import atomic_path, write_json

TextStates = tuple[Tensor, Tensor]
"""States [B, L, D] and mask [B, L] bool, True = a token."""

_CHUNK = 256


def digest(*parts: bytes) -> str:
    """Names what a cache was made from."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    return digest(*(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in module.state_dict().values()))


def cached(path: Path, made_from: str, shape: tuple[int, ...], fill: Callable[[np.memmap], None]) -> Tensor:
    """The fp16 array [shape] in `path`, filled by `fill` unless it was made from the same already; read from the disk
    as it is needed."""
    note = path.with_suffix(".json")
    if not path.is_file() or not note.is_file() or json.loads(note.read_text())["made_from"] != made_from:
        with atomic_path(path) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            fill(array)
            array.flush()
        write_json(note, {"made_from": made_from})
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write, since torch wants a writable array


def make_latents(work: Path, drawings: Drawings, vae: AutoencoderDC) -> Tensor:
    """Scaled latents [n, pairs, C, h, w] fp16 of the drawings, each pair with its fixed jitter."""
    jitter = fixed_jitter(drawings.entries)
    sample = encode(vae, torch.zeros(1, 3, *drawings.masks.shape[1:], dtype=torch.uint8))

    def fill(array: np.memmap) -> None:
        for pair in tqdm(range(len(PAIRS)), desc="latents", unit="colour pair", disable=None):
            colours = colours_of(torch.full((len(drawings),), pair), jitter[:, pair])
            for start in range(0, len(drawings), _CHUNK):
                part = slice(start, start + _CHUNK)
                array[part, pair] = encode(vae, compose(drawings.masks[part], colours[part])).half().numpy()

    made_from = digest(drawings.masks.numpy().tobytes(), jitter.numpy().tobytes(), weights_digest(vae).encode())
    return cached(work / "latents.npy", made_from, (len(drawings), len(PAIRS), *sample.shape[1:]), fill)


def make_text(work: Path, captions: Sequence[str], text: MiniLMEncoder) -> tuple[Tensor, Tensor]:
    """Text states [n, L, D] fp16 and lengths [n] int64 of the captions: the first so many states count."""
    lengths = torch.empty(len(captions), dtype=torch.long)
    for start in range(0, len(captions), _CHUNK):
        tokens = text.tokenizer(list(captions[start : start + _CHUNK]), truncation=True, max_length=text.max_tokens)
        lengths[start : start + _CHUNK] = torch.tensor([len(ids) for ids in tokens["input_ids"]])

    def fill(array: np.memmap) -> None:
        for start in tqdm(range(0, len(captions), _CHUNK), desc="text", unit="batch", disable=None):
            part = slice(start, start + _CHUNK)
            array[part] = text.encode(list(captions[part]))[0].half().cpu().numpy()

    made_from = digest("\n".join(captions).encode(), str(text.max_tokens).encode())
    return cached(work / "text.npy", made_from, (len(captions), text.max_tokens, text.dim), fill), lengths
