"""Models of one layer, where a test asks that they run, and not how large they are."""

from __future__ import annotations

from tbcm.models.sana import presets


def shrink() -> None:
    """For the rest of this process, the tiny model that is made of random parts and its text encoder have one layer."""
    presets.MINILM["num_hidden_layers"] = presets.SANA["tiny"]["num_layers"] = 1
