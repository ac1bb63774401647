from __future__ import annotations

import torch

from tbcm.icons.colours import (
    BACKGROUNDS,
    FOREGROUNDS,
    JITTER,
    PAIRS,
    colours_of,
    compose,
    fixed_jitter,
    random_colours,
)
from tbcm.icons.dataset import Drawing


def test_compose_blends_by_the_mask() -> None:
    masks = torch.tensor([[[0, 255], [51, 128]]], dtype=torch.uint8)
    image = compose(masks, torch.tensor([[[200.0, 0, 10], [100, 50, 10]]]))
    assert image.shape == (1, 3, 2, 2) and image.dtype == torch.uint8
    assert image[0, 0].tolist() == [[100, 200], [120, 150]]  # 100 + 100 * 51/255 and 100 + 100 * 128/255
    assert image[0, 1].tolist() == [[50, 0], [40, 25]]
    assert (image[0, 2] == 10).all()


def test_a_pair_has_its_named_colours_up_to_the_jitter() -> None:
    pairs = torch.arange(len(PAIRS))
    named = torch.tensor([[FOREGROUNDS[fg], BACKGROUNDS[bg]] for fg, bg in PAIRS]).float()
    assert torch.equal(colours_of(pairs, torch.zeros(len(PAIRS), 2, 3)), named)
    assert torch.equal(colours_of(pairs, torch.ones(len(PAIRS), 2, 3)), (named + JITTER).clamp(max=255))


def test_no_two_names_come_near_each_other() -> None:
    for named in (FOREGROUNDS, BACKGROUNDS):
        colours = torch.tensor(list(named.values())).float()
        distances = torch.cdist(colours, colours) + 1e9 * torch.eye(len(colours))
        assert distances.min() > 2 * JITTER * 3**0.5  # two jittered ones cannot meet


def test_the_fixed_jitter_depends_on_the_drawing_alone() -> None:
    one, two = Drawing("a", "x", "key", "solid"), Drawing("a", "y", "key", "solid")
    jitter = fixed_jitter([one, two])
    assert jitter.shape == (2, len(PAIRS), 2, 3) and jitter.abs().max() <= 1
    assert torch.equal(fixed_jitter([two])[0], jitter[1]) and not torch.equal(jitter[0], jitter[1])


def test_random_colours_stay_in_range() -> None:
    colours = random_colours(500, torch.Generator().manual_seed(0))
    assert colours.shape == (500, 2, 3) and colours.min() >= 0 and colours.max() <= 255
