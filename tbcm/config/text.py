"""A configuration's text: YAML and key=value overrides in, a tree of sections out, in which text is as it was written.

YAML reads `2026-11-28` as a date, `007` as a number and `no` as false. Where a field holds text, a file's value is what
stands there; an override's is all that follows the =, and `null` alone means none, where the field may be empty.

A file may begin from another: `extends: other.yaml`, beside it or by a path from it. Its own keys win, section by
section.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.constructor import BaseConstructor, ConstructorError

from tbcm.config.paths import user_path
from tbcm.errors import UserError, shown

EXTENDS = "extends"


def read_tree(path: str | Path, overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """The file's sections, on those of the files that it extends, with the overrides applied. `model` says which fields
    hold text.

    Raises UserError, with file, line and column or the override.
    """
    tree = read_file(Path(path), model)
    for override in overrides:
        _apply(tree, override, model)
    return tree


def read_file(path: Path, model: type[BaseModel], extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Its sections, on those of the files that it extends. `extended_by`: the files that led here, from the first."""
    by = f" ({EXTENDS} of {extended_by[-1]})" if extended_by else ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration{by}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the configuration is not UTF-8 text (byte {error.start})") from None
    tree = _yaml(text, model, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of sections, such as `train:`")
    if EXTENDS not in tree:
        return tree
    base, chain = _base(path, tree.pop(EXTENDS)), (*extended_by, path)
    if base.resolve() in [each.resolve() for each in chain]:
        raise UserError(f"{' extends '.join(map(str, (*chain, base)))}: in a circle; take one {EXTENDS} out")
    return merge(read_file(base, model, chain), tree, model)


def _base(path: Path, name: Any) -> Path:
    try:
        if not isinstance(name, str):
            raise ValueError("a path")
        return path.parent / user_path(name)
    except ValueError as error:
        raise UserError(f"{path}: {EXTENDS} = {shown(name)}: should be {error}") from None


def merge(below: dict[str, Any], above: dict[str, Any], model: Any) -> dict[str, Any]:
    """Sections in one; of all else, and where `above` has another of several sections, what it says. (Only as deep as
    `model` has sections: YAML may nest in circles.)"""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        annotation, pair = annotation_of(model, [key]), (below[key], above[key])
        sections = sections_of(annotation)
        if not sections or not all(isinstance(part, dict) for part in pair):
            continue
        if len(sections) > 1 and len({part.get("name", _default_name(model, key)) for part in pair}) > 1:
            continue
        merged[key] = merge(*pair, annotation)
    return merged


def _default_name(model: Any, key: str) -> Any:
    """Of the one of several sections that a field holds where nothing is said."""
    fields = [section.model_fields[key] for section in sections_of(model) if key in section.model_fields]
    return getattr(fields[0].default, "name", None)


class _Loader(yaml.SafeLoader):
    """PyYAML, but for numbers as in YAML 1.2 (it takes 1e-5 for a string), and with every error placed.

    A key that is there twice is an error: PyYAML takes the last and says nothing.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"{shown(key.value)} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of every kind: "!!timestamp x" is an AttributeError
            value = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a value"
            raise ConstructorError(None, None, f"{value} is no {node.tag[-30:]}", node.start_mark) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _yaml(text: str, annotation: Any, where: str) -> Any:
    """What `text` says, for a field of the type `annotation`."""
    return _with_text_as_written(*_parsed(text, where), annotation)


def _parsed(text: str, where: str) -> tuple[Any, Any]:
    """What `text` says, and the same with every value as it is written."""
    loader = None
    try:
        loader = _Loader(text)
        if (node := loader.get_single_node()) is None:
            return None, None
        raw = BaseConstructor().construct_document(node)  # first, for the other one merges nodes
        return loader.construct_document(node), raw
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"the character U+{ord(text[error.position]):04X}" if error.position < len(text) else "its end"
        raise UserError(f"{where}: not YAML: line {line}: {character} is not allowed") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or "malformed"
    except RecursionError:
        assert loader is not None
        mark, problem = loader.get_mark(), "nested too deeply"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    raise UserError(f"{where}: not YAML: {place}{problem[:300]}")


def _with_text_as_written(value: Any, raw: Any, annotation: Any) -> Any:
    """`value`, with those parts from `raw` that are to be text."""
    if is_text(annotation):
        return raw if value is not None and isinstance(raw, str) else value
    if get_origin(annotation) is list and isinstance(value, list) and isinstance(raw, list):
        (item,) = get_args(annotation)
        return [_with_text_as_written(*pair, item) for pair in zip(value, raw, strict=True)]
    if sections_of(annotation) and isinstance(value, dict) and isinstance(raw, dict):
        return {
            key: _with_text_as_written(part, raw.get(key), annotation_of(annotation, [key]))
            for key, part in value.items()
        }
    return value


def _apply(tree: dict[str, Any], override: str, model: type[BaseModel]) -> None:
    key, equals, value = override.partition("=")
    where = f"override {shown(override)}"
    if not equals or not key:
        raise UserError(f"{where}: write section.key=value, such as train.steps=100")
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(tree, dict):
            tree[section] = {} if tree.get(section) is None else tree[section]
            tree = tree[section]
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {'.'.join(sections)} holds a value, not a section")
    annotation = annotation_of(model, [*sections, last])
    if not is_text(annotation):
        tree[last] = _yaml(value, annotation, where)
    else:
        tree[last] = None if value == "null" and NoneType in get_args(annotation) else value


def annotation_of(model: Any, keys: Sequence[Any]) -> Any:
    """The type of a field, None where there is no such field. (Where a section is one of several, a field that some
    of them share has one type.)"""
    for key in keys:
        fields = [section.model_fields[key] for section in sections_of(model) if key in section.model_fields]
        model = fields[0].annotation if fields else None
    return model


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold: one, one of several, or none."""
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [section for part in get_args(annotation) for section in sections_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def is_text(annotation: Any) -> bool:
    """Whether a field of this type holds text, or text or None."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_text(parts[0])
    if origin is Literal:
        return all(isinstance(part, str) for part in parts)
    if origin in (Union, UnionType):
        return all(is_text(part) for part in parts if part is not NoneType)
    return annotation is str
