"""The typed configuration: YAML and key=value overrides in, a validated frozen model out (checked by pydantic)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from tbcm.config.card import with_card
from tbcm.config.methods import Discrete, Dmd2, Method, Tbcm
from tbcm.config.paths import UserFolder
from tbcm.config.resolution import Size, sizes_of
from tbcm.config.section import Section
from tbcm.config.sections import (
    Checkpoint,
    Data,
    Ema,
    Log,
    Optimizer,
    Parallel,
    Profile,
    Student,
    Teacher,
    Text,
    Train,
)
from tbcm.config.text import read_tree, sections_of
from tbcm.errors import UserError, shown

RENAMED = {"teacher.image_size": "resolution"}
"""Keys of earlier versions."""


class Config(Section):
    """A run. `python -m tbcm.train CONFIG --print-config` prints it resolved."""

    out: UserFolder
    resolution: Annotated[tuple[Size, ...], BeforeValidator(sizes_of)] = Field(
        ((1024, 1024),),
        description="of images, in pixels: 1024, [height, width], or a list of such sizes of which each step draws one;"
        " the first is that of previews and of what is exported",
    )
    frames: PositiveInt = Field(
        1,
        description="of a sample, where the teacher makes videos (Wan: 1, 5, 9, ...); saved one below the other",
    )
    teacher: Teacher
    data: Data
    text: Text = Text()
    method: Method = Tbcm()
    student: Student = Student()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    train: Train = Train()
    parallel: Parallel = Parallel()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.method.from_images and (self.data.images is None) == (self.data.latents is None):
            raise ValueError(
                f"{_of_images(self.method)} needs data.images ('icons', a folder of images with a metadata.jsonl,"
                " or .tar shards) or, with data.images=null, data.latents (what tbcm.encode_images wrote)"
            )
        if self.method.from_images and self.frames > 1:
            raise ValueError(f"{_of_images(self.method)} needs frames=1 (now {self.frames}): images are no videos")
        if self.method.judge and self.teacher.fp8:
            raise ValueError(
                f"{_judged(self.method)} needs teacher.fp8=false: its discriminator needs the teacher's gradient"
            )
        if self.parallel.mode == "fsdp" and self.optimizer.name == "came":
            raise ValueError("parallel.mode=fsdp needs optimizer.name=adamw: CAME takes no sharded weights")
        if self.parallel.mode == "fsdp" and isinstance(self.method, Dmd2) and self.method.fake.optimizer == "came":
            raise ValueError("parallel.mode=fsdp needs method.fake.optimizer=adamw: CAME takes no sharded weights")
        if self.parallel.mode == "fsdp" and isinstance(self.method, Discrete) and self.method.target_decay:
            raise ValueError(
                f"parallel.mode=fsdp needs method.target_decay=0 (now {self.method.target_decay:g}): a target network"
                " of its own is not sharded"
            )
        if self.method.from_images and self.text.cache is not None:
            raise ValueError(
                f"{_of_images(self.method)} encodes the images' captions: it cannot take them from text.cache"
            )
        if self.method.from_images and self.data.latents is not None and len(self.resolution) > 1:
            raise ValueError(
                f"data.latents={self.data.latents} holds latents of one size, and resolution names"
                f" {len(self.resolution)}: give one, or data.images in its place"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _of_images(method: Any) -> str:
    """The settings by which a method learns from images."""
    return f"method.name={method.name}{method.with_images}"


def _judged(method: Any) -> str:
    """The settings by which a method has a discriminator."""
    return f"method.name={method.name}" + (" with method.adversary" if method.name != "sprint" else "")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (see `tbcm.config.text`).

    Raises UserError, one line naming key, value and what is allowed, before anything else is touched.
    """
    return parse_config(read_tree(path, overrides, Config), str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """What `tree` says, and of all else what the teacher's card says (see `tbcm.config.card`). Raises UserError."""
    tree, card = with_card(tree, Config)
    where = f"{where} (on {card})" if card else where
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        first, count = error.errors()[:5], error.error_count()
        more = f"; and {count - 5:,} more" if count > 5 else ""
        raise UserError(f"{where}: " + "; ".join(map(_explain, first)) + more) from None


def _explain(error: Any) -> str:
    keys, section = _place(error["loc"])
    key, kind = ".".join(keys), error["type"]
    if kind == "extra_forbidden":
        if key in RENAMED:
            return f"{key} (value {shown(error['input'])}) is now called {RENAMED[key]}"
        allowed = ", ".join(section.model_fields)
        of = f" (method.name={keys_name})" if (keys_name := _name_of(section)) else ""
        return f"unknown key {shown(key)} (value {shown(error['input'])}); allowed here{of}: {allowed}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        context = error["ctx"]
        return f"{key}.name = {shown(context['tag'])}: should be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{key} = {shown(error['input'])}: should be a section"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key} = {shown(error['input'])}: should be {message}" if key else message


def _place(location: tuple[str | int, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to an error, and the section of the last one. (In pydantic's location a section that is one of
    several is followed by its name.)"""
    keys: list[str] = []
    section: type[BaseModel] = Config
    annotation: Any = Config
    for part in location:
        among = sections_of(annotation)
        chosen = [one for one in among if len(among) > 1 and part == _name_of(one)]
        if chosen:
            annotation = chosen[0]
            continue
        keys.append(str(part))
        if among:
            section = among[0]
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field else None
    return keys, section


def _name_of(section: type[BaseModel]) -> str | None:
    """ "scm" for the settings of sCM; None for a section that is not one of several."""
    field = section.model_fields.get("name")
    return get_args(field.annotation)[0] if field and section in sections_of(Method) else None
