from __future__ import annotations

from collections import Counter

import pytest

from tbcm.icons.captions import (
    HELD_OUT,
    STYLES,
    WORDINGS,
    Catalogue,
    Prompt,
    caption,
    colour_is_held_out,
    held_out_style,
    wordings,
)
from tbcm.icons.colours import BACKGROUNDS, FOREGROUNDS
from tbcm.icons.concepts import CONCEPTS
from tbcm.icons.dataset import Drawing

FULL = Prompt("light bulb", "solid", "red", "light blue")


def test_wordings() -> None:
    assert [caption(FULL, i) for i in range(WORDINGS)] == [
        "solid red light bulb on light blue",
        "red solid light bulb icon, light blue background",
        "light bulb icon, red, solid, on light blue",
        "solid red light bulb icon on a light blue background",
        "light bulb, solid, red, light blue background",
    ]
    assert caption(Prompt("key")) == "key" and caption(Prompt("key"), 1) == "key icon"
    assert caption(FULL.without(("style", "bg")), 3) == "red light bulb icon"
    with pytest.raises(ValueError, match="wording 5"):
        caption(FULL, WORDINGS)


def test_every_wording_is_used_about_equally() -> None:
    prompts = [Prompt(concept, style, fg, "white") for concept in CONCEPTS for style in STYLES for fg in FOREGROUNDS]
    used = Counter(wording for prompt in prompts for wording in wordings(prompt, 1))
    assert set(used) == set(range(WORDINGS))
    assert max(used.values()) < 1.3 * min(used.values())
    assert wordings(FULL) == wordings(Prompt(*vars(FULL).values()))


def test_held_out_shares() -> None:
    combinations = [(f"concept {i}", fg) for i in range(500) for fg in FOREGROUNDS]
    share = sum(colour_is_held_out(*pair) for pair in combinations) / len(combinations)
    assert share == pytest.approx(HELD_OUT, abs=0.011)  # 3 standard deviations of a binomial
    styles = Counter(held_out_style(f"concept {i}") for i in range(4000))
    assert styles["solid"] / 4000 == pytest.approx(HELD_OUT / 2, abs=0.008)
    assert styles["outline"] / 4000 == pytest.approx(HELD_OUT / 2, abs=0.008)


def test_a_catalogue_splits_all_full_prompts() -> None:
    both = next(concept for concept in (f"concept {i}" for i in range(1000)) if held_out_style(concept) == "solid")
    entries = [
        Drawing("s", "a", both, "solid"),
        Drawing("s", "b", both, "outline"),
        Drawing("s", "c", "key", "outline"),
    ]
    catalogue = Catalogue(entries)
    seen, unseen = (set(catalogue.full(held_out)) for held_out in (False, True))
    assert not seen & unseen and len(seen | unseen) == 3 * len(FOREGROUNDS) * len(BACKGROUNDS)
    assert {prompt for prompt in seen | unseen if (prompt.concept, prompt.style) == (both, "solid")} <= unseen
    assert not colour_is_held_out(both, "black") and Prompt(both, "outline", "black", "white") in seen
    # Where a concept is drawn in one style only, that style is trained on whatever the hash says.
    assert Prompt(both, "solid", "black", "white") in set(Catalogue(entries[:1]).full(held_out=False))
