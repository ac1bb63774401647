from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from tbcm.emoji import dataset
from tbcm.emoji.dataset import (
    build,
    caption_of,
    concept_of,
    fetch,
    is_held_out,
    load_images,
    read_atlas,
    visible_slugs,
    write_atlas,
)
from tbcm.errors import UserError
from tbcm.images import to_pil


def test_a_caption_is_the_words_of_the_name_and_the_style() -> None:
    assert caption_of("chocolate-bar", "noto v1") == "chocolate bar, noto v1"


@pytest.mark.parametrize(
    ("slug", "concept"),
    [
        ("chocolate-bar", "chocolate-bar"),
        ("woman-running", "running"),
        ("man-running-facing-right", "running"),
        ("person-in-lotus-position", "in-lotus-position"),
        ("people-holding-hands", "holding-hands"),
        ("woman", "woman"),
        ("human", "human"),
        ("mango", "mango"),
        ("snowman", "snowman"),
    ],
)
def test_concept_leaves_out_who_does_it(slug: str, concept: str) -> None:
    assert concept_of(slug) == concept


def test_skin_tones_and_hidden_icons_are_left_out() -> None:
    icons: dict[str, dict[str, object]] = {
        "waving-hand": {},
        "waving-hand-dark": {},
        "waving-hand-medium-light": {},
        "man-red-hair": {},
        "man-medium-dark-skin-tone-red-hair": {},
        "light-bulb": {},
        "cloud-with-lightning": {},
        "folding-hand-fan": {"hidden": True},
    }
    assert visible_slugs(icons) == ["cloud-with-lightning", "light-bulb", "man-red-hair", "waving-hand"]


def test_the_split_is_a_fixed_five_percent() -> None:
    # Known answers: another hash would put shipped training captions among the held-out ones.
    assert [c for c in ("factory", "volcano", "sloth", "popcorn", "cat", "pizza") if is_held_out(c)] == [
        "factory",
        "volcano",
        "sloth",
        "popcorn",
    ]
    held_out = sum(is_held_out(f"concept-{i}") for i in range(20_000))
    assert 0.045 < held_out / 20_000 < 0.055  # 3 standard deviations of a binomial are 0.0046


def test_images_and_captions_come_back_in_order(data: Path) -> None:
    images = load_images(data)
    assert images.images.shape == (16, 3, 64, 64) and images.images.dtype == torch.uint8
    names = ["cat", "factory", "man running", "woman running"]
    styles = ["noto", "noto v1", "fluent", "fluent flat"]
    assert [entry.caption for entry in images.entries] == [f"{name}, {style}" for style in styles for name in names]
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    for cat in images.images[::4]:
        assert (cat == red[:, None, None]).all()


def test_transparency_is_blended_with_white_once(data: Path) -> None:
    factory = load_images(data).images[1]  # black, half opaque, over the whole tile
    assert ((factory.int() - 127).abs() <= 1).all()


def test_an_icon_that_is_not_square_is_centred_on_white(data: Path) -> None:
    wide = load_images(data).images[3]  # 16 x 8 units, blue
    assert (wide[:, :16] == 255).all() and (wide[:, 48:] == 255).all()
    assert (wide[0, 16:48] == 0).all() and (wide[2, 16:48] == 255).all()


def test_no_concept_is_on_both_sides_of_the_split(data: Path) -> None:
    images = load_images(data)
    seen, unseen = images.split(held_out=False), images.split(held_out=True)
    assert {e.concept for e in unseen.entries} == {"factory"}
    assert {e.concept for e in seen.entries} == {"cat", "running"}
    assert len(seen.images) == len(seen.entries) == 12 and len(unseen.images) == len(unseen.entries) == 4


def test_two_builds_are_equal(data: Path, packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", packages)
    for file in data.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_atlas_gives_back_every_pixel(tmp_path: Path) -> None:
    tiles = torch.randint(256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_atlas(tmp_path / "atlas.webp", [to_pil(tile) for tile in tiles], columns=3)
    assert torch.equal(read_atlas(tmp_path / "atlas.webp", 7, size=8), tiles)


def test_missing_dataset_is_one_line_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captions\.json is missing.*python -m tbcm\.emoji\.dataset"):
        load_images(tmp_path)


def test_missing_atlas_is_named(data: Path) -> None:
    (data / "fluent.webp").unlink()
    with pytest.raises(UserError, match=r"fluent\.webp is missing"):
        load_images(data)


def test_missing_tarball_is_named(packages: Path, tmp_path: Path) -> None:
    (packages / "iconify-json-noto-v1-1.2.5.tgz").unlink()
    with pytest.raises(UserError, match=r"iconify-json-noto-v1-1\.2\.5\.tgz is missing"):
        build(tmp_path / "out", packages)


@pytest.mark.parametrize("content", [b"not a tarball", b""])
def test_broken_tarball_is_named(packages: Path, tmp_path: Path, content: bytes) -> None:
    (packages / "iconify-json-noto-1.2.9.tgz").write_bytes(content)
    with pytest.raises(UserError, match=r"iconify-json-noto-1\.2\.9\.tgz is no package of icons"):
        build(tmp_path / "out", packages)


def test_tarball_without_icons_is_named(packages: Path, tmp_path: Path) -> None:
    with tarfile.open(packages / "iconify-json-noto-1.2.9.tgz", "w:gz") as archive:
        archive.add(packages / "iconify-json-noto-v1-1.2.5.tgz", "package/readme")
    with pytest.raises(UserError, match=r"is no package of icons.*icons\.json.*not found"):
        build(tmp_path / "out", packages)


def test_without_npm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm.*not installed.*--packages"):
        fetch(tmp_path)


def test_a_failing_npm_is_quoted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'first line' >&2\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm error code E404") as error:
        fetch(tmp_path)
    assert "first line" not in str(error.value)


def test_command_line(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dataset", str(tmp_path / "out"), "--packages", str(packages)])
    assert dataset.main() == 0
    assert "16 images" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["dataset", str(tmp_path / "out"), "--packages", str(tmp_path / "nowhere")])
    assert dataset.main() == 2
    assert capsys.readouterr().err.startswith("error: ")
