"""The judge of icons, on a small made-up set of drawings: every concept has a stripe of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, write_teacher
from torch import Tensor

from tbcm.evaluation import drawings as reference
from tbcm.evaluation import icons
from tbcm.evaluation.distances import fid, kid
from tbcm.evaluation.icons import TEACHER_SEED as SEED
from tbcm.evaluation.icons import IconJudge, middle, spread
from tbcm.icons import captions
from tbcm.icons.colours import BACKGROUNDS, FOREGROUNDS, PAIRS, colours_of, compose
from tbcm.icons.dataset import Drawing, Drawings, write_drawings
from tbcm.models.pipeline import Pipeline

CONCEPTS = ("key", "moon", "star")
EACH = 12  # drawings of a concept, a quarter of them in a set that nothing is trained on


def coarse(images: Tensor, batch_size: int = 64, device: object = "cpu") -> Tensor:
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def mask(concept: int, drawing: int) -> Tensor:
    picture = torch.zeros(64, 64, dtype=torch.uint8)
    picture[8 + 16 * concept : 22 + 16 * concept, 8 : 40 + drawing] = 255
    return picture


class Teacher:
    """A sampler whose image i is noise of (seed, i)."""

    batch = 7

    def __init__(self, home: Path) -> None:
        self.config, self.pipeline, self.calls = tiny_config(home), Pipeline(str(home / "teacher")), []

    def __call__(self, prompts: list[str], *, steps: int, guidance: float, seed: int, first: int) -> Tensor:
        self.calls.append((len(prompts), steps, guidance, seed, first))
        return torch.stack([noise(seed, first + i) for i in range(len(prompts))])


def noise(seed: int, image: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + image)
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_teacher(tmp_path / "teacher")
    made = [(k, i) for k in range(len(CONCEPTS)) for i in range(EACH)]
    entries = [Drawing("bi" if i % 4 == 0 else "one", f"i{i}", CONCEPTS[k], "solid") for k, i in made]
    write_drawings(Drawings(torch.stack([mask(*which) for which in made]), entries), tmp_path)
    monkeypatch.setattr(icons, "_ASSETS", tmp_path)
    for module in (icons, reference):
        monkeypatch.setattr(module, "features", coarse)
    monkeypatch.setattr(captions, "colour_is_held_out", lambda concept, fg: (concept, fg) == ("key", "red"))
    return tmp_path


def judge(home: Path, images: int = 12, **options: Any) -> tuple[IconJudge, Teacher]:
    teacher = Teacher(home)
    return IconJudge(teacher, images, **options), teacher  # type: ignore[arg-type]


ALL = len(CONCEPTS) * len(PAIRS)


def as_asked(this: IconJudge, drawing: int = 1, concept: int | None = None) -> Tensor:
    """Images that show what is asked for, all in one drawing of the concept (or of another one)."""
    kinds = [CONCEPTS.index(prompt.concept) if concept is None else concept for prompt in this.asked]
    pairs = torch.tensor([PAIRS.index((str(prompt.fg), str(prompt.bg))) for prompt in this.asked])
    return compose(torch.stack([mask(k, drawing) for k in kinds]), colours_of(pairs, torch.zeros(len(pairs), 2, 3)))


def test_prompts_name_everything_in_a_fixed_order(home: Path) -> None:
    everything = judge(home, ALL)[0].asked
    assert len(set(everything)) == ALL and all(None not in vars(prompt).values() for prompt in everything)
    assert judge(home, 12)[0].asked == everything[:12]
    assert {prompt.fg for prompt in everything} == set(FOREGROUNDS)
    assert {prompt.bg for prompt in everything} == set(BACKGROUNDS)


def test_distances_are_to_real_images_and_to_the_teachers_samples(home: Path) -> None:
    this, teacher = judge(home, ALL)
    images = torch.stack([noise(0, i) for i in range(ALL)])
    samples = coarse(torch.stack([noise(SEED, i) for i in range(ALL)]))
    assert len(this.real) == 2 * ALL
    unseen = torch.tensor([(prompt.concept, prompt.fg) == ("key", "red") for prompt in this.asked])
    assert unseen.sum() == len(BACKGROUNDS)
    expected = {
        "kid": 1e3 * kid(coarse(images), this.real),
        "fid": fid(coarse(images), this.real),
        "kid_to_teacher": 1e3 * kid(coarse(images), samples),
        "fid_to_teacher": fid(coarse(images), samples),
        "kid_heldout": 1e3 * kid(coarse(images)[unseen], this.real[unseen.repeat(2)]),
    }
    assert this.distances(images) == pytest.approx(expected)
    assert teacher.calls[0] == (7, 20, 3.0, SEED, 0) and sum(call[0] for call in teacher.calls) == ALL
    floor = this.floor()
    assert floor["n"] == ALL and floor["teacher_kid"] == pytest.approx(1e3 * kid(samples, this.real))
    assert abs(floor["kid"]) < 0.05 * floor["teacher_kid"]


def test_real_images_show_what_they_were_asked_for(home: Path) -> None:
    this, _ = judge(home, ALL)
    found = this.text(this._real_images[:ALL])
    for what in ("concept", "foreground", "background", "style"):
        assert found[what] == found[f"{what}_heldout"] == 1, what


def test_what_is_wrong_is_counted_and_only_that(home: Path) -> None:
    this, _ = judge(home, ALL)
    found = this.text(as_asked(this, concept=0))
    keys = sum(prompt.concept == "key" for prompt in this.asked)
    assert found["concept"] == pytest.approx(keys / ALL) and found["foreground"] == found["style"] == 1
    swapped = as_asked(this).clone()
    swapped[:10] = compose(torch.stack([mask(0, 1)] * 10), torch.tensor([[[20.0, 20, 20], [255, 255, 255]]] * 10))
    black = sum(prompt.fg == "black" for prompt in this.asked[:10])
    assert this.text(swapped)["foreground"] == pytest.approx(1 - (10 - black) / ALL)


def test_one_drawing_for_every_prompt_is_no_diversity(home: Path) -> None:
    this, _ = judge(home, ALL)
    floor, collapsed = this.text_floor(), this.text(as_asked(this))
    assert floor["real_concept"] == 1 and floor["real_n"] == len(CONCEPTS) * EACH // 4
    assert collapsed["recall"] < 0.3 < floor["real_recall"]
    assert collapsed["coverage"] < floor["real_coverage"]
    few, _ = judge(home, 3)
    assert "coverage" not in few.text(as_asked(few))


def test_what_the_autoencoder_loses_is_measured_against_other_real_images(home: Path) -> None:
    this, _ = judge(home, ALL)
    found = this.autoencoder_floor()  # of random weights
    assert found["autoencoder_kid"] > 10 * abs(this.floor()["kid"]) and found["autoencoder_fid"] > 0


def test_what_is_expensive_is_kept_and_only_for_the_same(home: Path) -> None:
    cache = home / "cache"
    first, teacher = judge(home, cache=cache)
    values = {**first.floor(), **first.text_floor()}
    again, second = judge(home, cache=cache)
    assert {**again.floor(), **again.text_floor()} == values and teacher.calls and not second.calls
    assert torch.equal(again.teacher_images, torch.stack([noise(SEED, i) for i in range(12)]))
    more, third = judge(home, 13, cache=cache)
    more.floor()
    assert third.calls
    weights = home / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    trained, fourth = judge(home, cache=cache)
    trained.floor()
    assert fourth.calls


def test_a_teacher_that_is_meant_otherwise_is_asked_again(home: Path) -> None:
    cache = home / "cache"
    judge(home, cache=cache)[0].floor()
    other, teacher = judge(home, cache=cache)
    section = teacher.config.teacher.model_copy(update={"null_mask": "conditional"})
    teacher.config = teacher.config.model_copy(update={"teacher": section})
    other.floor()
    assert teacher.calls


def test_other_numbers_of_images_are_refused(home: Path) -> None:
    this, _ = judge(home)
    for measure in (this.distances, this.text):
        with pytest.raises(ValueError, match="11 images for 12 prompts"):
            measure(as_asked(this)[:11])
    for images in (1, 4001):
        with pytest.raises(ValueError, match="2 to 4000"):
            judge(home, images)


def test_the_middle_guidance_is_the_samplers_own() -> None:
    assert middle([5.0, 3.0, 4.0]) == 4.0 and middle([4.0]) == 4.0
    assert spread(2, 5) == [0, 2]
