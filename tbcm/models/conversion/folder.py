"""A single file and a pipeline of its architecture, as a folder."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from tbcm.config.card import CARD
from tbcm.errors import UserError, first_line
from tbcm.models.conversion.file import read_tensors
from tbcm.models.conversion.filling import fill
from tbcm.models.conversion.groups import Held, groups_of
from tbcm.models.conversion.network import from_single_file
from tbcm.models.conversion.renaming import Converted
from tbcm.models.families.pipeline import SANA
from tbcm.models.families.rows import family_of
from tbcm.models.json_files import read_json
from tbcm.models.pipeline import Pipeline
from tbcm.models.weights import check_files, choose_variant, guarded, needed, variants
from tbcm.runtime.files import atomic_folder, write_json

Classes = Mapping[str, tuple[str, str]]
"""(library, class) of each part that a pipeline has."""


@dataclass(frozen=True)
class Report:
    """Which parts come from the file, which from the pipeline, and why what was left out was (by published name without
    the part's prefix)."""

    converted: list[str]
    taken: list[str]
    left_out: dict[str, str]


def convert(file: Path, out: Path, like: str, *, dtype: torch.dtype | None = None, averaged: bool = False) -> Report:
    """Writes the folder `out`: the pipeline `like` (a folder or hub id) with the weights of `file`, in `dtype` (None:
    the file's own); of a training's checkpoint the `averaged` ones.

    Raises:
        UserError: `out` is there and not empty; a file that is no checkpoint; tensors that are missing, left over or
            quantised; a pipeline class that nothing here distils, or parts without weights.
    """
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: choose another folder or remove it")
    files = Pipeline(like)
    network, classes = _network_of(files), _classes_of(files)
    tensors = read_tensors(file, averaged=averaged)
    groups, left_out = groups_of(tensors, {part: name for part, (_, name) in classes.items()}, network, str(file))
    others = {part: _needed(files, part) for part in classes if part not in groups}
    home = _at_home(files, groups, others)
    _check_prediction(tensors, home, str(file), like)
    models = {}
    for part, held in groups.items():
        models[part], why = _model(home, part, classes[part], held, dtype, f"{file}: its {part}")
        left_out |= why
    with atomic_folder(out) as folder:
        for name in ("model_index.json", CARD):
            if (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
        for part, names in others.items():
            _copy(home / part, folder / part, names)
        for part, model in models.items():
            model.save_pretrained(folder / part)
    return Report(sorted(models), sorted(others), left_out)


def _network_of(files: Pipeline) -> str:
    """The part that is distilled. Raises UserError for a class that has no row."""
    name = str(files.index.get("_class_name"))
    return "transformer" if name in SANA else family_of(name).network


def _classes_of(files: Pipeline) -> Classes:
    entries = {part: entry for part, entry in files.index.items() if isinstance(entry, list) and len(entry) == 2}
    return {part: (str(entry[0]), str(entry[1])) for part, entry in entries.items() if None not in entry}


def _needed(files: Pipeline, part: str) -> dict[str, str]:
    """File names of a part that is taken as it is, and what they become. Raises UserError where some are missing."""
    names, where = files.names(part), f"{files.path}: {part}/"
    if not names:
        raise UserError(f"{where} is missing; model_index.json names it")
    if "config.json" in names and not variants(names):
        raise UserError(f"{where} has no weights, and the file holds none for it: take a --like that has them")
    variant = choose_variant(names, None, where, strict=False)
    if files.is_local:
        check_files(Path(files.location, part), variant)
    return needed(names, variant)


def _at_home(files: Pipeline, groups: Collection[str], others: Mapping[str, Collection[str]]) -> Path:
    """The pipeline as a folder of this disk; of a hub's, what is needed is downloaded."""
    if files.is_local:
        return Path(files.location)
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/config.json" for part in groups)]
    wanted += [f"{part}/{name}" for part, names in others.items() for name in names]
    try:
        return Path(snapshot_download(files.location, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"{files.path}: cannot be downloaded ({first_line(error)})") from None


def _check_prediction(tensors: Collection[str], home: Path, where: str, like: str) -> None:
    """SDXL's fine-tunes that predict v say so by an empty tensor of that name (a convention of ComfyUI's)."""
    said = read_json(home / "scheduler" / "scheduler_config.json").get("prediction_type")
    if "v_pred" in tensors and said != "v_prediction":
        raise UserError(
            f"{where}: predicts v (it holds v_pred), and the scheduler of {like} says prediction_type = {said!r}: take"
            " a --like whose scheduler says v_prediction"
        )


def _model(
    home: Path, part: str, entry: tuple[str, str], held: Held, dtype: torch.dtype | None, where: str
) -> tuple[Any, dict[str, str]]:
    """With the weights in place, and what was left out of them."""
    library, name = entry
    module = diffusers if library == "diffusers" else importlib.import_module("transformers")
    if library not in ("diffusers", "transformers") or not hasattr(module, name):
        raise UserError(f"{where}: {library}'s {name} is no class that can be converted")
    cls = getattr(module, name)

    def hollow() -> Any:
        with torch.device("meta"):
            if held.text:
                return cls(cls.config_class.from_pretrained(home, subfolder=part))
            return cls.from_config(cls.load_config(home, subfolder=part))

    model = guarded(hollow, f"{home / part}")
    converted: Converted = held.text(held.tensors, model) if held.text else from_single_file(held.tensors, model, where)
    fill(model, converted, dtype, where)
    return model, dict(converted.left_out)


def _copy(source: Path, folder: Path, names: Mapping[str, str]) -> None:
    folder.mkdir()
    for name, plain in names.items():
        if name != plain and name.endswith(".json"):  # an index: its shards lose their variant, too
            tree = read_json(source / name)
            renamed = {key: names.get(shard, shard) for key, shard in tree["weight_map"].items()}
            write_json(folder / plain, tree | {"weight_map": renamed})
        else:
            shutil.copyfile(source / name, folder / plain)
