"""Every reader of data, fed with damaged files: python tests/fuzzing.py [--inputs 20000] [--seed 0]

Whatever the input, a reader either takes it or raises one UserError of one line that names the file.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import random
import re
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mutations import mutated
from PIL import Image

from tbcm.data.captions import PromptSource
from tbcm.data.decoding import decode_file
from tbcm.data.embedding_writer import CacheWriter
from tbcm.data.embeddings import CachedEncoder
from tbcm.data.images import open_images
from tbcm.data.latent_writer import LatentWriter
from tbcm.data.latents import PrecomputedLatents
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.evaluation.references import open_reference

WORDS = ["a cat, sitting", 'a "red" panda', "café 桜 🐼", "two\nlines", "plain", " x "]
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


@dataclass(frozen=True)
class Target:
    """A reader, `good` contents of the file `name` that it reads, and whether those keep their length."""

    name: str
    good: list[bytes]
    read: Callable[[Path], None]
    same_length: bool = False

    @property
    def named(self) -> str:
        """What an error names: the file, or the folder that it is in."""
        return self.name.split("/")[0].split(".")[0]


def check(read: Callable[[Path], None], file: Path, what: str, named: str) -> bool:
    """Whether `file` was refused. Raises AssertionError where it was in another way than it should be."""
    try:
        read(file)
    except UserError as error:
        text = str(error)
        assert "\n" not in text and text.isprintable(), f"{what}: not one line: {text!r}"
        assert named in text, f"{what}: does not name {named}: {text}"
        assert not ADDRESS.search(text), f"{what}: has an address: {text}"
        assert len(text) < 4000, f"{what}: {len(text)} characters: {text[:300]}"
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


def fuzz(target: Target, folder: Path, inputs: int, seed: int) -> int:
    """Feeds `inputs` mutations, and answers how many were refused."""
    file = folder / target.name
    file.parent.mkdir(parents=True, exist_ok=True)
    refused = 0
    for good in target.good:  # none of these is
        file.write_bytes(good)
        assert not check(target.read, file, f"{target.name}, as it was", "")
    for number in range(inputs):
        source = random.Random(f"{seed}/{target.name}/{number}")
        content = mutated(source.choice(target.good), source, same_length=target.same_length)
        file.write_bytes(content)
        refused += check(target.read, file, f"{target.name}, seed {seed}, input {number}", target.named)
    return refused


def targets(home: Path) -> list[Target]:
    """Every reader. `home` is a folder of their own."""
    return [*_tables(home), *_images(), *_image_sets(), *_caches(home)]


def _tables(home: Path) -> list[Target]:
    rows = [{"id": i, "prompt": word, "json": {"prompt": word}, "all": [word, "b"]} for i, word in enumerate(WORDS * 3)]
    text = "\n".join(f"{word}" for word in WORDS).encode()
    lines = "\n".join(json.dumps(row, ensure_ascii=i % 2 > 0) for i, row in enumerate(rows)).encode()
    table = pa.Table.from_pylist(rows)

    def separated(delimiter: str) -> bytes:
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter).writerows([["id", "prompt"], *enumerate(WORDS)])
        return file.getvalue().encode()

    def parquet(**options: Any) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=7, **options)
        return file.getvalue()

    def prompts(column: str) -> Callable[[Path], None]:
        def read(file: Path) -> None:
            source = load_prompts(file, column, folder=home / "clean")
            [source.drawn(i, 1, 0) for i in range(len(source))]
            shutil.rmtree(home / "clean")

        return read

    packed = [gzip.compress(lines, mtime=0)]
    tables = [parquet(), parquet(compression="zstd", data_page_version="2.0"), parquet(use_dictionary=False)]
    return [
        Target("words.txt", [text, text.decode().encode("utf-16")], prompts("")),
        Target("words.jsonl", [lines], prompts("prompt")),
        Target("nested.jsonl", [lines], prompts("json.prompt")),
        Target("several.jsonl", [lines], prompts("all")),
        Target("words.csv", [separated(",")], prompts("prompt")),
        Target("words.tsv", [separated("\t")], prompts("prompt")),
        Target("words.jsonl.gz", packed, prompts("prompt")),
        Target("words.parquet", tables, prompts("prompt")),
        Target("nested.parquet", tables, prompts("json.prompt")),
        Target("several.parquet", tables, prompts("all")),
    ]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 4), np.uint8), "RGBA").convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _images() -> list[Target]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "a maker", {0x9000: b"0230", 0x927C: b"\0" * 20}
    more = {"save_all": True, "append_images": [picture(2)]}
    kinds = {
        "image.png": [saved(picture(1, mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P")]
        + [saved(picture(1, "P"), "PNG", transparency=b"\0\7" * 9), saved(picture(1), "PNG", exif=exif, **more)],
        "image.jpg": [
            saved(picture(1), "JPEG", exif=exif),
            saved(picture(1, "CMYK"), "JPEG"),
            saved(picture(1), "JPEG", progressive=True),
        ],
        "image.webp": [saved(picture(1, "RGBA"), "WEBP", exif=exif), saved(picture(1), "WEBP", lossless=True, **more)],
        "image.gif": [saved(picture(1), "GIF", **more), saved(picture(1, "P"), "GIF", transparency=3)],
        "image.tiff": [
            saved(picture(1, mode), "TIFF", compression=c) for mode in ("RGB", "CMYK") for c in (None, "lzma")
        ],
        "image.bmp": [saved(picture(1, mode), "BMP") for mode in ("RGB", "P", "1")],
        "image.avif": [saved(picture(1), "AVIF")],
        "image.ppm": [saved(picture(1), "PPM")],
    }

    def read(file: Path) -> None:
        assert decode_file(file, (8, 8)).shape == (3, 8, 8)

    return [Target(name, good, read) for name, good in kinds.items()]


def _image_sets() -> list[Target]:
    png = saved(picture(3), "PNG")
    rows = [{"file_name": "a.png", "text": word, "image": {"bytes": png, "path": None}} for word in WORDS]

    def beside(file: Path) -> None:
        (file.parent / "a.png").write_bytes(png)
        of_folder(file)

    def of_folder(file: Path) -> None:
        look(str(file.parent))

    def look(path: str) -> None:
        data = open_images(path)
        data.images(range(len(data)), (8, 8))
        list(data.captions)

    def tar(kind: int) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as shard:
            for name, content in (
                *(("a" * 110 + "/1.png", png), ("a" * 110 + "/1.txt", b"one"), ("ü2.png", png)),
                *(("ü2.json", b'{"text": "two", "n": 2}'), ("3.png", png), ("3.txt", b"three"), ("3.cls", b"7")),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        return file.getvalue()

    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows).drop(["file_name"]), table, row_group_size=4)
    lines = [{"file_name": "a.png", "text": word} for word in WORDS]
    listed = io.StringIO()
    csv.writer(listed).writerows([["file_name", "text"], *(["a.png", word] for word in WORDS)])
    mjhq = json.dumps({"a": {"category": ".", "prompt": "x"}}).encode()

    def reference(file: Path) -> None:
        (file.parent / "a.jpg").write_bytes(png)
        data = open_reference(file.parent)
        data.images(range(len(data)), (8, 8))

    return [
        Target("lines/metadata.jsonl", ["\n".join(map(json.dumps, lines)).encode()], beside),
        Target("listed/metadata.csv", [listed.getvalue().encode()], beside),
        Target(
            "shard.tar",
            [tar(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)],
            lambda file: look(str(file)),
        ),
        Target("images.parquet", [table.getvalue()], lambda file: look(str(file))),
        Target("text/a.txt", [b"a caption"], beside),
        Target("object/a.json", [b'{"text": ["a caption", "another"], "n": {"m": 1}}'], beside),
        Target("mjhq/meta_data.json", [mjhq], reference),
    ]


def _caches(home: Path) -> list[Target]:
    states, latents = home / "states", home / "latents"
    clean = PromptSource.of("words", ["a", "bc", "d e"])
    writer = CacheWriter(states, {"text.max_tokens": 4, "dtype": "float32"})
    writer.begin(clean)
    for name in writer.names:
        count = len(writer.prompts(name))
        writer.write(name, [(torch.randn(count, 4, 5), torch.arange(4)[None] <= torch.arange(count)[:, None])])
    writer.finish(clean)
    other = LatentWriter(latents, {"dtype": "float16"})
    other.begin(PromptSource.of("words", [["a", "b"], ["c"], ["d"]]))
    other.write(other.names[0], [torch.randn(3, 2, 4, 4)], [1])
    other.finish(0.5)

    def read_states(file: Path) -> None:
        cached = CachedEncoder(file.parent)
        cached.encode(["a", "d e", "bc"])
        cached.encode([""], instruct=False)
        cached.check({"text.max_tokens": 4})

    def read_latents(file: Path) -> None:
        data = PrecomputedLatents(file.parent)
        _, taken = data.latents(range(len(data)), (8, 8))
        [data.captions.drawn(i, 0, 0) for i in taken]

    found = []
    for folder, read in ((states, read_states), (latents, read_latents)):
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        for name in whole:

            def again(file: Path, name: str = name, whole: dict[str, bytes] = whole, read: Any = read) -> None:
                for other, content in whole.items():  # of earlier targets; the others of this folder are good
                    if other != name:
                        (file.parent / other).write_bytes(content)
                read(file)

            changes = name != "manifest.json"
            found.append(Target(f"{folder.name}-{name.split('.')[0]}/{name}", [whole[name]], again, changes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of each reader (default: 20,000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--only", default="", help="readers whose name has this")
    arguments = parser.parse_args()
    quiet()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in targets(Path(folder)):
            if arguments.only in target.name:
                started = time.perf_counter()
                refused = fuzz(target, Path(folder) / "files", arguments.inputs, arguments.seed)
                total += arguments.inputs
                seconds = time.perf_counter() - started
                print(
                    f"{target.name:44} {arguments.inputs:8,} inputs, {refused:8,} refused, {seconds:6.1f} s", flush=True
                )
    print(f"seed {arguments.seed}: {total:,} inputs; nothing but UserErrors of one line")


def quiet() -> None:
    """Nothing of what readers tell; and memory for a small file's reader only."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
