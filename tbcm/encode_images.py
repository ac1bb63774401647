"""Encode images once: python -m tbcm.encode_images CONFIG OUT [key=value ...] (with torchrun for many)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tbcm.config import Config, load_config
from tbcm.config.paths import path_argument
from tbcm.config.resolution import Size
from tbcm.errors import UserError, command
from tbcm.runtime import failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tbcm.data.latents import CaptionedLatents

DTYPES = {"fp16": "float16", "fp32": "float32"}
EPILOG = """
examples:
  python -m tbcm.encode_images configs/sana_scm.yaml latents data.images='shards/*.tar'
  torchrun --nproc_per_node 8 -m tbcm.encode_images configs/sana_scm.yaml latents data.images=FOLDER
  torchrun --nproc_per_node 8 -m tbcm.train configs/sana_scm.yaml data.images=null data.latents=latents

data.images is 'icons', a folder of images with a metadata.jsonl, .csv or .parquet (file_name and data.caption_column)
or a .txt beside each, .parquet files with images inside,
or WebDataset shards: a folder of .tar files, 'shards/*.tar' or 'shards/{00000..00041}.tar', of 0001.jpg (.png, .webp)
and 0001.txt (or .json, with data.caption_column). docs/data.md has all of it. data.max_bad_share may be bad.

It may be stopped at any time: the same command goes on, and keeps every file that is there and whole. All nodes must
see OUT. fp16 takes 64 kB for an image of 1,024 pixels (32 channels of 32 x 32). Training refuses latents of another
teacher, size or scale. Images that are changed later are not noticed: encode them into another folder.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.encode_images",
        description="Encode captioned images once, for training the baselines without a VAE (data.latents=OUT).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", type=path_argument, help="of the training: says which images, whose VAE, and resolution"
    )
    parser.add_argument("out", type=path_argument, help="the folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, such as data.images=FOLDER")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored latents (default: fp16)")
    parser.add_argument("--batch", type=int, default=8, help="images that are encoded at once (default: 8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser.parse_intermixed_args()


@command
@failure.reported
def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch}: give at least 1")
    if config.data.images is None:
        raise UserError("there are no images to encode: give data.images=FOLDER (and data.latents=null)")

    from tbcm.runtime.job import job

    with job(arguments.out, arguments.device) as device:
        encode_dataset(config, str(arguments.out), device, dtype=DTYPES[arguments.dtype], batch=arguments.batch)


def encode_dataset(config: Config, out: str, device: torch.device, *, dtype: str, batch: int = 8) -> None:
    """Fills the folder `out` with the latents of data.images. Every rank calls it and takes its share of the files."""
    from tbcm.data.latent_writer import LatentWriter
    from tbcm.data.sharded import progress_bar, share
    from tbcm.runtime import distributed
    from tbcm.samples.noised import VaeLatents
    from tbcm.setup.images import build_black_latents, build_images, build_vae, latents_identity, vae_weights
    from tbcm.setup.networks import check_sizes, pipeline_of

    data = config.data
    assert data.images is not None
    (size, *others) = config.resolution
    if others:
        raise UserError(
            f"resolution names {len(others) + 1} sizes, and latents are of one: give one, and a folder for each"
        )
    check_sizes(config)
    made_with = {
        **latents_identity(config),
        "data.images": data.images if data.images == "icons" else os.path.realpath(data.images),
        "data.caption_column": data.caption_column,
        "computed_in": str(vae_weights(config, device)).removeprefix("torch."),
        "dtype": dtype,
    }
    images = build_images(config)
    writer = LatentWriter(Path(out), made_with)
    distributed.run_on_main(lambda: writer.begin(images.captions))
    build_black_latents(config.model_copy(update={"out": out}), device)  # training has no VAE to make it with
    todo, whole = share(writer.names, writer.is_whole)
    if todo:
        encoded = VaeLatents(pipeline_of(config), build_vae(config, device), images, device, data.max_bad_share)
        with progress_bar(sum(len(writer.indices(name)) for name in todo), "image") as progress:
            for name in todo:
                writer.write(name, *_encoded(encoded, writer.indices(name), size, batch, progress))
    distributed.barrier()
    manifest = distributed.run_on_main(lambda: writer.finish(data.max_bad_share))
    logging.getLogger("tbcm").info("%s", summary(manifest, out, kept=len(whole)))


def _encoded(
    encoded: CaptionedLatents, indices: Sequence[int], size: Size, batch: int, progress: tqdm[Any]
) -> tuple[list[Tensor], list[int]]:
    """Latents batch by batch, and which images are bad: others have taken their places."""
    latents, bad = [], []
    for start in range(0, len(indices), batch):
        some = indices[start : start + batch]
        found, taken = encoded.latents(some, size)
        latents.append(found.cpu())
        bad += [index for index, other in zip(some, taken, strict=True) if index != other]
        progress.update(len(some))
    return latents, bad


def summary(manifest: dict[str, Any], out: str, kept: int) -> str:
    size = sum(file["bytes"] for file in manifest["files"].values())
    shape = " x ".join(map(str, manifest["shape"]))
    return f"{out}: {manifest['images']:,} latents of {shape}, {size / 1e6:,.1f} MB" + (
        f", {len(manifest['bad']):,} of them of bad images, which training will skip" * bool(manifest["bad"])
        + f" ({kept:,} files were there already)" * bool(kept)
    )


if __name__ == "__main__":
    sys.exit(main())
