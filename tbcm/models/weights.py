"""The weights of one part of a diffusers pipeline: which files they are in, whether those are whole, and whether what
`from_pretrained` made of them is what its configuration says."""

from __future__ import annotations

import errno
import logging
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import nn

from tbcm.errors import UserError, first_line
from tbcm.models.json_files import read_json

logger = logging.getLogger(__name__)

_STEM = r"(?:diffusion_pytorch_model|pytorch_model|model)"
_ENTRY = re.compile(
    rf"{_STEM}(?:\.(?P<a>[^.]+))?\.(?:safetensors|bin)(?:(?:\.(?P<b>[^.]+))?\.index(?:\.(?P<c>[^.]+))?\.json)?"
)
"""A file that a library looks for: the weights, or the index of their shards, perhaps of a variant."""
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")
_NUMBER = re.compile(r"-\d{5}-of-\d{5}")
_TEXTS = ".json", ".txt", ".model", ".jinja"
"""Endings of what tells a library how to use weights, tokenizers' vocabularies among it."""
_LFS = b"version https://git-lfs"


def variants(names: Collection[str]) -> dict[str | None, list[str]]:
    """Of a part's file names, those of weights and of indices of shards, by variant (None: the plain ones)."""
    found: dict[str | None, list[str]] = {}
    for name in sorted(names):
        match = _ENTRY.fullmatch(name)
        variant = next(filter(None, match.groups()), None) if match else None
        if match and not (variant and _SHARD.fullmatch(variant)):
            found.setdefault(variant, []).append(name)
    return found


def needed(names: Collection[str], variant: str | None) -> dict[str, str]:
    """Of a part's file names those that loading a variant needs, and what they are called as plain ones: of weights the
    safetensors, where there are any."""
    found = {name: _ENTRY.fullmatch(_NUMBER.sub("", name)) for name in sorted(names)}
    weights = [n for n, match in found.items() if match and next(filter(None, match.groups()), None) == variant]
    weights = [name for name in weights if ".safetensors" in name] or weights
    others = [name for name, match in found.items() if not match and Path(name).suffix in _TEXTS and "/" not in name]
    return {name: name.replace(f".{variant}", "", 1) if name in weights else name for name in (*weights, *others)}


def choose_variant(names: Collection[str], asked: str | None, where: str, *, strict: bool) -> str | None:
    """The variant to load: `asked`, or the plain weights, or the only ones there are.

    Raises:
        UserError: several variants and none was asked for, or (with `strict`) not the one that was.
    """
    found = variants(names)
    if asked in found:
        return asked
    present = ", ".join(variant or "plain" for variant in found)
    if asked is not None and found and (strict or None not in found):
        raise UserError(f"{where}: no weights of the variant {asked!r} (teacher.variant); there are: {present}")
    if None in found or not found:
        return None
    if len(found) > 1:
        raise UserError(f"{where}: its weights are there as variants only: choose teacher.variant of {present}")
    (only,) = found
    logger.info("%s: taking its only weights, variant %s", where, only)
    return only


def check_files(folder: Path, variant: str | None) -> None:
    """Raises UserError, with the file's name, where weights in a local folder are damaged or shards are missing."""
    for name in variants([path.name for path in folder.iterdir()]).get(variant, []):
        file = folder / name
        if file.suffix == ".json":
            for shard in _shards(file):
                _check_weights(folder / shard, of=file)
        else:
            _check_weights(file)


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    tree = read_json(index)
    shards = tree.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: no index of shards: its weight_map should give each tensor's file")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if not name or Path(name).name != name or "\0" in name]:
        raise UserError(f"{index}: names the file {outside[0][:200]!r}, which is not one beside it")
    return names


def _check_weights(file: Path, of: Path | None = None) -> None:
    with readable(file, of):
        if numbers := [name for name, floating in _tensors(file) if not floating and name.endswith(("weight", "bias"))]:
            raise UserError(f"{file}: {numbers[0]} holds whole numbers: quantised weights are not supported")


@contextmanager
def readable(file: Path, of: Path | None = None) -> Iterator[None]:
    """For reading a file of weights (which the index `of` names). Raises UserError, with its name, where that fails."""
    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(_LFS)) == _LFS
        if pointer:
            raise UserError(f"{file}: a Git LFS pointer and not the weights: run git lfs pull there")
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # from the disk, or from safetensors or pickle: malformed in one of many ways
        unpickling, reason = isinstance(error, UnpicklingError), first_line(error)
        if unpickling and (named := re.search(r"GLOBAL (\S+)", str(error))):
            advice = "a file that may run code is not read; take a .safetensors file"
            raise UserError(f"{file}: holds {named[1]} beside tensors: {advice}") from None
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a place that a cut file has not got
            index = f" (which {of.name} names)" if of else ""
            raise UserError(f"{file}: cannot be read{index}: {error.strerror or reason}") from None
        reason = "nothing that torch.save wrote" if unpickling else reason
        raise UserError(f"{file}: damaged ({reason}); download or copy it again") from None


def _tensors(file: Path) -> list[tuple[str, bool]]:
    """Names of the tensors in a file, and whether they are of floating-point numbers; no value is read."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return [(name, "F" in opened.get_slice(name).get_dtype()) for name in opened.keys()]  # noqa: SIM118
    weights = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    return [(name, value.is_floating_point()) for name, value in weights.items()]


def load_weights(
    cls: Any, source: str, part: str, dtype: torch.dtype, where: str, *, heads: bool = False, **options: Any
) -> Any:
    """`cls.from_pretrained` of a part, in `dtype`; `options` go to it. Of diffusers or of transformers. `heads`: as for
    `check_fit`.

    Raises:
        UserError: it cannot be loaded, or its weights are not those that its configuration asks for.
    """
    options["torch_dtype" if issubclass(cls, ModelMixin) else "dtype"] = dtype
    model, info = guarded(
        lambda: cls.from_pretrained(
            source, subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True, **options
        ),
        where,
    )
    check_fit(model, info, where, heads=heads)
    return model


def guarded(load: Callable[[], Any], where: str) -> Any:
    """What a library's loading returns. It fails in as many ways as files can be malformed: each is one line."""
    try:
        with _silent():
            return load()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be loaded ({first_line(error)})") from None


def check_fit(
    model: nn.Module,
    info: Mapping[str, Any],
    where: str,
    advice: str = "Take both from the same model",
    *,
    heads: bool = False,
) -> None:
    """Raises UserError where the names that from_pretrained calls missing, unexpected and mismatched are a fault. A
    buffer that the model computes (position embeddings) may be among the weights, and so may a language model's head
    that nothing here uses; with `heads` all that lies in none of the model's modules (CLIP's images beside its text).
    """
    computed = {name for name, _ in model.named_buffers()}
    unexpected = [key for key in info["unexpected_keys"] if key not in computed and not key.startswith("lm_head.")]
    if heads:
        own = {name for name, _ in model.named_children()}
        unexpected = [key for key in unexpected if key.partition(".")[0] in own]
    shapes = [f"{key} is {list(found)} and should be {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    missing = [key for key in info["missing_keys"] if key not in mismatched]
    kinds = {"missing": missing, "not in the model": unexpected, "of another shape": shapes}
    if faults := [_named(kind, keys) for kind, keys in kinds.items() if keys]:
        raise UserError(f"{where}: the weights do not fit config.json: {'; '.join(faults)}. {advice}")


def _named(kind: str, keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} {kind} ({first}{', ...' if len(keys) > 3 else ''})"


@contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' own reports, of many lines, on what becomes one line here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
