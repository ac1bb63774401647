"""What captions say, in how many ways, and which combinations nobody trains on.

A prompt names a concept and maybe a style, a foreground and a background: what it leaves out is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tbcm.icons.colours import BACKGROUNDS, FOREGROUNDS
from tbcm.icons.dataset import Drawing, chance

STYLES = ("solid", "outline")
WORDINGS = 5
HELD_OUT = 0.05  # share of concept x colour, and of concepts one style of which is held out


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for; None: it does not say."""

    concept: str
    style: str | None = None
    fg: str | None = None
    bg: str | None = None

    def without(self, attributes: Sequence[str]) -> Prompt:
        kept: dict[str, Any] = dict.fromkeys(attributes)
        return Prompt(**{**vars(self), **kept})


def caption(prompt: Prompt, wording: int = 0) -> str:
    """`solid red heart on white` and the like, in one of `WORDINGS` ways (from 0 on)."""
    words = [word for word in (prompt.style, prompt.fg) if word]
    match wording:
        case 0:
            return _join(" ", *words, prompt.concept) + _on(prompt, " on {}")
        case 1:
            return _join(" ", *words[::-1], prompt.concept, "icon") + _on(prompt, ", {} background")
        case 2:
            return _join(", ", f"{prompt.concept} icon", *words[::-1]) + _on(prompt, ", on {}")
        case 3:
            return _join(" ", *words, prompt.concept, "icon") + _on(prompt, " on a {} background")
        case 4:
            return _join(", ", prompt.concept, *words) + _on(prompt, ", {} background")
    raise ValueError(f"wording {wording}: there are {WORDINGS}")


def _join(separator: str, *words: str) -> str:
    return separator.join(words)


def _on(prompt: Prompt, pattern: str) -> str:
    return pattern.format(prompt.bg) if prompt.bg else ""


def wordings(prompt: Prompt, count: int = 2) -> list[int]:
    """Which wordings the training uses for a prompt: a hash chooses, so that every one of them is met with every word,
    and the text states to keep are few."""
    facts = [str(value) for value in vars(prompt).values()]
    return sorted(range(WORDINGS), key=lambda wording: chance(str(wording), *facts))[:count]


def held_out_style(concept: str) -> str | None:
    """The style in which nobody sees this concept, for a few concepts (that have both styles)."""
    draw = chance("style of", concept)
    return None if draw >= HELD_OUT else STYLES[draw >= HELD_OUT / 2]


def colour_is_held_out(concept: str, fg: str) -> bool:
    """Whether nobody sees this concept in this colour."""
    return chance("colour of", concept, fg) < HELD_OUT


class Catalogue:
    """Which prompts there are for the drawings at hand, and which of them are held out."""

    def __init__(self, entries: Sequence[Drawing]) -> None:
        self.groups: dict[tuple[str, str], list[int]] = {}  # indices of the drawings of a concept in a style
        for i, entry in enumerate(entries):
            self.groups.setdefault((entry.concept, entry.style), []).append(i)
        self.concepts = sorted({concept for concept, _ in self.groups})

    def is_held_out(self, concept: str, style: str, fg: str) -> bool:
        """Whether the combination is kept from training."""
        both = all((concept, other) in self.groups for other in STYLES)
        return colour_is_held_out(concept, fg) or (both and style == held_out_style(concept))

    def full(self, held_out: bool) -> Iterator[Prompt]:
        """Prompts that name everything, of the held-out combinations or of the others."""
        for concept, style in sorted(self.groups):
            for fg in FOREGROUNDS:
                if self.is_held_out(concept, style, fg) == held_out:
                    yield from (Prompt(concept, style, fg, bg) for bg in BACKGROUNDS)
