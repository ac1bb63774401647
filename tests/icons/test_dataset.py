from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tbcm.errors import UserError
from tbcm.icons import dataset, packages
from tbcm.icons.dataset import Drawing, Drawings, build, chance, load_drawings, load_shapes, write_drawings
from tbcm.icons.packages import fetch, read_set

from .conftest import write_package


def test_which_icons_become_drawings(data: Path) -> None:
    drawings = load_drawings(data)
    assert drawings.masks.shape == (len(drawings), 64, 64) and drawings.masks.dtype == torch.uint8
    found = {(entry.key, entry.concept, entry.style) for entry in drawings.entries}
    assert found == {
        ("bi:heart", "heart", "outline"),
        ("one:heart", "heart", "solid"),
        ("one:heart-fill", "heart", "solid"),  # and with it two:heart-filled, the same drawing
        ("one:heart-outline", "heart", "outline"),
        ("two:outline-favourite", "heart", "outline"),
        ("one:cog-24-regular", "gear", "outline"),
        ("two:gear", "gear", "outline"),
    }
    assert [entry.key for entry in drawings.select(unseen=True).entries] == ["bi:heart"]
    assert len(load_shapes(data)) == 1  # one:heart-broken; a set that nothing is trained on gives none


def test_a_drawing_like_an_unseen_one_is_not_trained_on(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "distinct", lambda masks: [0])
    build(tmp_path / "out", npm)
    hearts = [entry for entry in load_drawings(tmp_path / "out").entries if entry.concept == "heart"]
    assert [entry.icon_set for entry in hearts] == []  # its style has no drawing to train on, and goes too


def test_icons_left_out_go_with_what_is_like_them(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "left_out", lambda: {"two:heart-filled"})
    build(tmp_path / "out", npm)
    keys = {entry.key for entry in load_drawings(tmp_path / "out").entries}
    assert "one:heart" in keys and not keys & {"two:heart-filled", "one:heart-fill"}


def test_every_left_out_icon_is_one_of_the_sets() -> None:
    assert {key.split(":")[0] for key in dataset.left_out()} <= set(packages.VERSIONS)


def test_two_builds_are_equal(data: Path, npm: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", npm)
    for file in data.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_atlas_gives_back_every_pixel(tmp_path: Path) -> None:
    masks = torch.randint(256, (70, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawings = Drawings(masks, [Drawing("s", f"i{i}", "heart", "solid") for i in range(70)])
    write_drawings(drawings, tmp_path)
    again = load_drawings(tmp_path)
    assert torch.equal(again.masks, masks) and again.entries == drawings.entries


def test_chance_is_even_and_fixed() -> None:
    draws = torch.tensor([chance("a", str(i)) for i in range(5000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02) and draws.min() >= 0 and draws.max() < 1
    # Known answers: another hash would put combinations that were trained on among the held-out ones.
    assert [round(chance("colour of", "heart", fg), 4) for fg in ("red", "blue")] == [0.0765, 0.2117]


def test_missing_dataset_is_one_line_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"drawings\.json is missing.*python -m tbcm\.icons\.dataset"):
        load_drawings(tmp_path)


def test_missing_atlas_is_named(data: Path) -> None:
    (data / "drawings.webp").unlink()
    with pytest.raises(UserError, match=r"drawings\.webp is missing"):
        load_drawings(data)


def test_missing_tarball_is_named(npm: Path, tmp_path: Path) -> None:
    (npm / "iconify-json-two-1.0.0.tgz").unlink()
    with pytest.raises(UserError, match=r"iconify-json-two-1\.0\.0\.tgz is missing"):
        build(tmp_path / "out", npm)


@pytest.mark.parametrize("content", [b"not a tarball", b""])
def test_broken_tarball_is_named(npm: Path, tmp_path: Path, content: bytes) -> None:
    (npm / "iconify-json-two-1.0.0.tgz").write_bytes(content)
    with pytest.raises(UserError, match=r"iconify-json-two-1\.0\.0\.tgz is no package of icons"):
        build(tmp_path / "out", npm)


@pytest.mark.parametrize("license_", ["CC-BY-4.0", "GPL-3.0"])
def test_a_set_under_another_licence_is_refused(tmp_path: Path, license_: str) -> None:
    write_package(tmp_path / "set.tgz", "one", license_)
    with pytest.raises(UserError, match=rf"set\.tgz is under {license_}; only MIT"):
        read_set(tmp_path / "set.tgz")


def test_hidden_icons_are_left_out(npm: Path) -> None:
    assert "old-heart" not in read_set(npm / "iconify-json-one-1.0.0.tgz").icons


def test_without_npm_the_error_says_so(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch(npm)  # everything is there
    with pytest.raises(UserError, match=r"npm.*not installed.*--packages"):
        fetch(tmp_path / "empty")


def test_a_failing_npm_is_quoted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'first line' >&2\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm error code E404") as error:
        fetch(tmp_path / "empty")
    assert "first line" not in str(error.value)


def test_command_line(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dataset", str(tmp_path / "out"), "--packages", str(npm)])
    assert dataset.main() == 0
    assert "7 drawings" in capsys.readouterr().out
    (npm / "iconify-json-two-1.0.0.tgz").write_bytes(b"")
    assert dataset.main() == 2
    assert capsys.readouterr().err.startswith("error: ")
