"""Model folders that are malformed in thousands of ways: each loads, or is refused in one line that names a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import write_teacher
from transformers import Gemma2Model, PreTrainedTokenizerFast

from tbcm.errors import UserError
from tbcm.models.loading import black_latents
from tbcm.models.pipeline import Pipeline

CPU = torch.device("cpu")
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    0.5,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "é" * 3000,
    [],
    [[]],
    [1, "x", None],
    [0] * 1000,
    {},
    {"a": {"b": []}},
]
RAW = [b"", b"\xff\xfe{\x00", b"null", b"[]", b"3", b'"x"', b"{", b'{"a":', b"[" * 5000, b"9" * 6000, b"\xef\xbb\xbf{}"]
INPUTS = 150
"""For each file."""


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model
) -> dict[str, bytes]:
    """The files of a folder, its VAE in shards."""
    folder = write_teacher(tmp_path_factory.mktemp("good") / "teacher")
    tokenizer.save_pretrained(folder / "tokenizer")
    gemma.save_pretrained(folder / "text_encoder")
    vae = Pipeline(str(folder)).load_vae(torch.float32)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="20KB")
    save_file({"64": torch.zeros(4, 8, 8)}, folder / "black_latent.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mutated_json(source: bytes, draw: random.Random) -> bytes:
    """A value replaced at any depth, a key lost, or the text itself damaged."""
    kind = draw.random()
    if kind < 0.15:
        return draw.choice(RAW)
    if kind < 0.3:
        return damaged(source, draw)
    tree = json.loads(source)
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and draw.random() < 0.7):
            break
        place = place[key]
    if kind < 0.4:
        del place[key]
    else:
        place[key] = draw.choice(ODD)
    return json.dumps(tree).encode()


def damaged(source: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut off, or put in; mostly at the beginning, where headers are."""
    made = bytearray(source)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(made), draw.choice([10, 300, 5000, 10**9])) or 1)
        match draw.randrange(4):
            case 0:
                made[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                made[at:at] = draw.randbytes(draw.randint(1, 9))
            case 2:
                del made[at : at + draw.randint(1, 50)]
            case _:
                del made[at:]
    return bytes(made)


USES: dict[str, Callable[[Pipeline], Any]] = {
    "model_index.json": lambda pipeline: (pipeline.timestep_scale, pipeline.load_transformer(torch.float32)),
    "transformer/config.json": lambda pipeline: (pipeline.timestep_scale, pipeline.load_transformer(torch.float32)),
    "transformer/diffusion_pytorch_model.safetensors": lambda pipeline: pipeline.load_transformer(torch.float32),
    "vae/config.json": lambda pipeline: (pipeline.compression, pipeline.load_vae(torch.float32)),
    "vae/diffusion_pytorch_model.safetensors.index.json": lambda pipeline: pipeline.load_vae(torch.float32),
    "vae/diffusion_pytorch_model-00001-of-00003.safetensors": lambda pipeline: pipeline.load_vae(torch.float32),
    "scheduler/scheduler_config.json": lambda pipeline: pipeline.sampling_shift,
    "text_encoder/config.json": lambda pipeline: pipeline.load_text_encoder(torch.float32),
    "text_encoder/model.safetensors": lambda pipeline: pipeline.load_text_encoder(torch.float32),
    "tokenizer/tokenizer.json": lambda pipeline: pipeline.load_text_encoder(torch.float32),
    "tokenizer/tokenizer_config.json": lambda pipeline: pipeline.load_text_encoder(torch.float32),
    "black_latent.safetensors": lambda pipeline: black_latents(pipeline, [(64, 64)], Path("unused"), CPU),
}
"""What the package does with each file of a folder."""


@pytest.mark.parametrize("name", USES)
def test_a_malformed_file_is_refused_in_one_line(good: dict[str, bytes], tmp_path: Path, name: str) -> None:
    folder, draw, refused = tmp_path / "teacher", random.Random(name), 0
    for other, content in good.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    USES[name](Pipeline(str(folder)))
    mutated = mutated_json if name.endswith(".json") else damaged
    for _ in range(INPUTS):
        content = mutated(good[name], draw)
        (folder / name).write_bytes(content)
        try:
            USES[name](Pipeline(str(folder)))
        except UserError as error:
            refused += 1
            message = str(error)
            assert str(folder) in message, message
            assert " object at 0x" not in message, message
            assert len(message) < 1000, message
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, from {content[:300]!r}") from error
    assert refused > INPUTS / 4
