"""Bad samples are skipped, counted, told once by kind, and end the run only above the share that is allowed."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data import bad as module
from tbcm.data.bad import GoodImages, SampleError, next_good
from tbcm.data.images import open_images
from tbcm.errors import UserError

EIGHT = 8, 8

COUNT = 40


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def files(damage: dict[str, bytes | None]) -> dict[str, bytes]:
    """COUNT images and captions; those named in `damage` have that content, or are missing."""
    whole = {f"{i}.png": png(i) for i in range(COUNT)} | {f"{i}.txt": b"number %d" % i for i in range(COUNT)}
    return {name: content for name, content in {**whole, **damage}.items() if content is not None}


def as_pairs(home: Path, damage: dict[str, bytes | None]) -> str:
    for name, content in files(damage).items():
        (home / name).write_bytes(content)
    return str(home)


def as_shard(home: Path, damage: dict[str, bytes | None]) -> str:
    with tarfile.open(home / "0.tar", "w") as tar:
        for name, content in files(damage).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(home)


def as_metadata(home: Path, damage: dict[str, bytes | None]) -> str:
    rows = []
    given = files(damage)
    for i in range(COUNT):
        if (image := given.get(f"{i}.png")) is not None:
            (home / f"{i}.png").write_bytes(image)
        text = given.get(f"{i}.txt")
        rows.append({"file_name": f"{i}.png"} | ({} if text is None else {"text": text.decode("utf-8", "replace")}))
    (home / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(home)


def as_table(home: Path, damage: dict[str, bytes | None]) -> str:
    given, rows = files(damage), []
    for i in range(COUNT):
        text = given.get(f"{i}.txt")
        rows.append(
            {
                "image": {"bytes": given.get(f"{i}.png"), "path": f"{i}.png"},
                "text": None if text is None else text.decode("utf-8", "replace"),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), home / "train-00000.parquet", row_group_size=7)
    return str(home)


LAYOUTS = pytest.mark.parametrize("layout", [as_pairs, as_shard, as_metadata, as_table])


@LAYOUTS
def test_samples_without_a_caption_are_left_out_and_told_once(
    tmp_path: Path, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = layout(tmp_path, {"3.txt": None, "7.txt": b" \n", "9.txt": None})
    with caplog.at_level(logging.WARNING, "tbcm"):
        data = open_images(path, max_bad_share=0.1)
    assert list(data.captions) == [f"number {i}" for i in range(COUNT) if i not in (3, 7, 9)]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "3 of 40 samples are bad and skipped: " in told and "such as " in told
    assert [round(float(x)) for x in (data.images([3, 6], (8, 8))[:, 0, 0, 0] + 1) * 127.5] == [4, 8]


@LAYOUTS
def test_too_many_bad_samples_end_the_run_and_the_setting_is_named(tmp_path: Path, layout: Any) -> None:
    path = layout(tmp_path, {f"{i}.txt": None for i in range(5)})
    with pytest.raises(
        UserError, match=r"5 of 40 samples are bad, more than data\.max_bad_share = 0\.1 allows: .*: 5 "
    ):
        open_images(path, max_bad_share=0.1)
    with pytest.raises(UserError):  # the first of them
        open_images(path)
    assert len(open_images(path, max_bad_share=0.125)) == 35


@LAYOUTS
@pytest.mark.parametrize("damaged", [b"", b"no image", png(3)[:45], b"<html>"], ids=["empty", "text", "cut", "page"])
def test_the_next_good_image_takes_the_place_of_one_that_cannot_be_decoded(
    tmp_path: Path, layout: Any, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_images(layout(tmp_path, {"3.png": damaged, "4.png": damaged, "39.png": damaged}), max_bad_share=0.1)
    good = GoodImages(data, 0.1)
    with caplog.at_level(logging.WARNING, "tbcm"):
        for indices in ([2, 3, 4, 5], [39, 0], [4, 3], [1, 3]):
            images, taken = good(indices, EIGHT)
            assert taken == [{3: 5, 4: 5, 39: 0}.get(i, i) for i in indices]
            shades = [round(float(x)) for x in (images[:, 0, 0, 0] + 1) * 127.5]
            assert shades == taken and [data.captions[i] for i in taken] == [f"number {i}" for i in taken]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "skipped, the next takes its place" in told
    with pytest.raises(SampleError, match="cannot be decoded"):
        data.images([2, 3], (8, 8))


class Fake:
    """`count` images, of which some cannot be decoded."""

    def __init__(self, count: int, bad: Sequence[int]) -> None:
        self.count, self.bad = count, set(bad)

    def __len__(self) -> int:
        return self.count

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        for index in indices:
            if index in self.bad:
                error = SampleError(f"image {index}: cannot be decoded", "damaged image")
                error.index = index
                raise error
        return torch.tensor(indices)


def test_who_takes_a_place_depends_on_nobody_that_asks() -> None:
    fake = Fake(1000, [5, 6, 500, 999])
    whole, taken = GoodImages(fake, 0.05)(range(1000), EIGHT)
    assert torch.equal(whole, torch.tensor(taken)) and not fake.bad & set(taken)
    for ranks in (2, 7):
        parts: dict[int, int] = {}
        for rank in range(ranks):
            mine = list(range(1000))[rank::ranks][::-1]
            good = GoodImages(fake, 0.05)
            for start in range(0, len(mine), 16):  # as a run that is resumed has seen nothing before
                some = mine[start : start + 16]
                parts |= dict(zip(some, good(some, EIGHT)[1], strict=True))
        assert [parts[i] for i in range(1000)] == taken


def test_the_share_is_of_what_was_tried_and_of_a_thousand_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    good = GoodImages(Fake(100_000, range(0, 100_000, 10)), 0.05)  # every tenth
    good(range(500), EIGHT)  # 50 bad ones are as many as may be of a thousand
    with pytest.raises(UserError, match=r"51 of 1,000 samples are bad, more than data\.max_bad_share = 0\.05 allows"):
        good(range(500, 520), EIGHT)
    monkeypatch.setattr(module, "ENOUGH", 10)
    with pytest.raises(UserError, match="of 100 samples are bad"):
        GoodImages(Fake(100_000, range(0, 100_000, 10)), 0.05)(range(100), EIGHT)
    with pytest.raises(UserError, match="2 of 4 samples are bad"):  # a small data set is its own measure
        GoodImages(Fake(4, [0, 2]), 0.3)([0, 1, 2], EIGHT)
    with pytest.raises(UserError):
        GoodImages(Fake(4, [0, 1, 2, 3]), 0.99)([0], EIGHT)


def test_a_file_that_cannot_be_read_is_no_bad_sample(tmp_path: Path) -> None:
    """A disk that fails would give another run than one that does not."""
    data = open_images(as_pairs(tmp_path, {}), max_bad_share=0.5)
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png: cannot be read: No such file"):
        GoodImages(data, 0.5)([3], EIGHT)


def test_next_good() -> None:
    assert [next_good(i, {1, 2, 4}, 5) for i in range(5)] == [0, 3, 3, 3, 0]
