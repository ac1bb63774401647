from __future__ import annotations

import pytest

from tbcm.icons.concepts import CONCEPTS, concept_of, is_compound, named_style, plain_name


@pytest.mark.parametrize(
    ("icon", "concept"),
    [
        ("heart-filled", "heart"),
        ("outline-home", "house"),
        ("home-24-filled", "house"),
        ("mail-outline-rounded", "envelope"),
        ("lightbulb-on", "light bulb"),
        ("trash-2", "trash can"),
        ("camera-off", None),
        ("home-plus", None),
        ("bell-slash", None),
        ("heart-broken", None),
        ("camera-duotone", None),
        ("facebook", None),
    ],
)
def test_concept_of_an_icon(icon: str, concept: str | None) -> None:
    plain = plain_name(icon)
    assert (concept_of(plain) if plain else None) == concept


def test_no_name_stands_for_two_concepts() -> None:
    names = [name for names in CONCEPTS.values() for name in names]
    assert len(names) == len(set(names))
    assert 80 <= len(CONCEPTS) <= 200


@pytest.mark.parametrize(("name", "compound"), [("camera-off", True), ("camera", False), ("firefox", False)])
def test_compounds(name: str, compound: bool) -> None:
    assert is_compound(name) == compound


def test_named_style() -> None:
    styles = [named_style(icon) for icon in ("heart-fill", "solid-star", "home-outline", "key-light", "key", "fillet")]
    assert styles == ["solid", "solid", "outline", "outline", None, None]
