"""What folders of computed tensors (text states, latents) have in common: safetensors shards, each written in one step
by any of many processes, and a manifest that names them all and is written last."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tbcm.data.files import reason, shown
from tbcm.errors import UserError
from tbcm.models.identity import key_of_model, same_model
from tbcm.runtime import distributed
from tbcm.runtime.files import atomic_path
from tbcm.runtime.leftovers import remove_leftovers

MANIFEST = "manifest.json"


class StoredFile(BaseModel):
    bytes: NonNegativeInt
    sha256: str | None = None


class Manifest(BaseModel):
    """What every manifest has at least."""

    format: int
    made_with: dict[str, Any]
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class Kind:
    """What a folder holds, the command that writes it, the format that this version reads, and what its manifest must
    have."""

    holds: str
    command: str
    format: int
    schema: type[Manifest]

    @property
    def again(self) -> str:
        return f"run {self.command} again as before, which makes what is missing"

    def read_manifest(self, folder: Path) -> dict[str, Any]:
        """Raises UserError where there is none, or none that this version reads."""
        path = folder / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if manifest["format"] != self.format:
                raise UserError(
                    f"{path}: has format {shown(manifest['format'])}, this version reads {self.format}: encode again"
                )
            self.schema.model_validate(manifest, strict=True)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no cache of {self.holds}, or not a finished one ({MANIFEST}); {self.again}"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise self.damaged(path, what) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(path, shown(error)) from None
        return manifest

    def damaged(self, path: Path, what: str) -> UserError:
        return UserError(f"{path}: damaged ({what}); remove it and {self.again}")

    def open(self, folder: Path) -> dict[str, Any]:
        """The manifest. Raises UserError also where a file that it names is missing or cut."""
        manifest = self.read_manifest(folder)
        for name, file in manifest["files"].items():
            self._check_size(folder / name, file["bytes"])
        return manifest

    def begin(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        """Makes `folder` ready to be written to. Rank 0 does, before any other touches it.

        Raises UserError where it holds a finished cache that was made with other settings.
        """
        if (folder / MANIFEST).is_file():
            if different := differences(self.read_manifest(folder)["made_with"], made_with):
                raise UserError(
                    f"{folder} holds a cache that was made otherwise (there -> now): {different};"
                    " remove it or choose another folder"
                )
            (folder / MANIFEST).unlink()  # until the end there is no cache
        remove_leftovers(folder)

    def read(self, path: Path, *names: str) -> tuple[dict[str, str], list[Tensor]]:
        """A file's metadata and tensors. They are mapped into memory: what is not used is not read.

        Raises UserError where it is missing or not whole.
        """
        try:
            with safe_open(path, "pt") as file:
                return file.metadata() or {}, [file.get_tensor(name) for name in names]
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(f"{path}: missing or damaged ({reason(error)}); {self.again}") from None

    def read_all(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """As `read`, of all tensors by their names, sorted."""
        try:
            with safe_open(path, "pt") as file:
                names = sorted(file.keys())
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{path}: missing or damaged ({reason(error)}); {self.again}") from None
        metadata, tensors = self.read(path, *names)
        return metadata, dict(zip(names, tensors, strict=True))

    def is_whole(self, path: Path, key: str, *names: str, verify: bool = False) -> bool:
        """Whether a file is there, with that `key` and in its full length; and, to `verify`, unchanged to the last
        bit. Of its tensors `names` are looked at, or all."""
        try:
            metadata, tensors = self.read(path, *sorted(names or self.read_all(path)[1]))
        except UserError:
            return False
        return metadata.get("key") == key and (not verify or metadata.get("sha256") == _digest(tensors))

    def _check_size(self, path: Path, size: int) -> None:
        try:
            actual = path.stat().st_size
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"{path}: {reason(error)}; {self.again}") from None
        if actual != size:
            raise UserError(f"{path}: damaged, it has {actual:,} bytes and not {size:,}; {self.again}")


def write(path: Path, key: str, tensors: dict[str, Tensor], *, beside: Path, bad: Sequence[int] = ()) -> None:
    """A file that tells by its `key` what it was made from and with, and which of its rows are `bad`, if any. It may be
    read by whom `beside` may be."""
    metadata = {"key": key, "sha256": _digest([tensors[name] for name in sorted(tensors)])}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata | ({"bad": json.dumps(list(bad))} if bad else {}))
        part.chmod(beside.stat().st_mode)  # safetensors lets only the owner read it


def key_of(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Where `old` is not `new`, as "key: old -> new, ..."; empty where it is. Models (see `model_identity`) are
    the same whatever path leads to them."""
    pairs = {key: (old.get(key), value) for key, value in new.items()}
    different = {key: pair for key, pair in pairs.items() if not _same(*pair)}
    return ", ".join(f"{key}: {' -> '.join(_told(*pair))}" for key, pair in different.items())


def key_of_settings(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """`made_with`, but for the paths that lead to models."""
    return {key: key_of_model(value) if isinstance(value, dict) else value for key, value in made_with.items()}


def _same(old: Any, new: Any) -> bool:
    return same_model(old, new) if isinstance(old, dict) or isinstance(new, dict) else old == new


def _told(old: Any, new: Any) -> tuple[str, str]:
    """For people: models by their paths, and where these do not tell them apart by their files, too."""
    models = [{"path": each, "files": "unknown"} if not isinstance(each, dict) else each for each in (old, new)]
    alike = models[0]["path"] == models[1]["path"]
    one, other = (f"{each['path']}" + f" (files {each['files']})" * alike for each in models)
    return one, other


def share(names: Sequence[str], is_whole: Callable[[str], bool]) -> tuple[list[str], set[str]]:
    """The files that this rank is to write, and all that are whole already. Every rank calls it."""
    # Rank 0 looks for all: while each looked for itself, others would be writing already.
    whole = distributed.run_on_main(lambda: {name for name in names if is_whole(name)})
    todo = [name for name in names if name not in whole]
    return todo[distributed.rank() :: distributed.world_size()], whole


def progress_bar(total: int, unit: str) -> tqdm[Any]:
    """Of rank 0, which has as much to do as any other: how many, their rate and the time left."""
    seconds = 0.1 if sys.stderr.isatty() else 60.0  # a batch system keeps every line
    return tqdm(total=total, unit=unit, disable=not distributed.is_main(), mininterval=seconds, dynamic_ncols=True)


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
