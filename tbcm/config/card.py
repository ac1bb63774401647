"""A teacher's card: what is known of a teacher and stands in no other file of its folder.

`tbcm_teacher.yaml` in the folder of a diffusers pipeline is a part of a configuration, such as the mask of its null
prompt or its text encoder. Whoever trained the teacher writes it once; every configuration with this `teacher.path`
begins from it, and its own keys win. (Of a teacher on a hub no card is read: a configuration needs no network.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tbcm.config.paths import teacher_folder, user_path
from tbcm.config.text import merge, read_file
from tbcm.errors import UserError, shown

CARD = "tbcm_teacher.yaml"
SECTIONS = "resolution", "teacher", "text", "method", "student"


def with_card(tree: Any, model: type[BaseModel]) -> tuple[Any, Path | None]:
    """`tree` on the card of its teacher, and that card's file, if there is one.

    Raises UserError where the card is not YAML, or has other sections. (Its values are checked with the rest.)
    """
    file = _card_of(tree)
    if file is None or not file.is_file():
        return tree, None
    card = read_file(file, model)
    if others := card.keys() - SECTIONS:
        raise UserError(f"{file}: {shown(min(map(str, others)))} is none of a teacher's: {', '.join(SECTIONS)}")
    return merge(card, tree, model), file


def _card_of(tree: Any) -> Path | None:
    teacher = tree.get("teacher") if isinstance(tree, dict) else None
    path = teacher.get("path") if isinstance(teacher, dict) else None
    if not isinstance(path, str):
        return None
    try:
        return teacher_folder(user_path(path)) / CARD
    except (ValueError, OSError):
        return None  # which the configuration's own check explains
