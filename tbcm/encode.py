"""Encode prompts once: python -m tbcm.encode PROMPTS OUT --config CONFIG [key=value ...] (with torchrun for many)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tbcm.config import Config, load_config
from tbcm.config.paths import path_argument, source_argument
from tbcm.errors import UserError, command
from tbcm.runtime import failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tbcm.models.text import TextEncoder

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
EPILOG = """
examples:
  python -m tbcm.encode prompts.parquet cache --config configs/sana.yaml
  torchrun --nproc_per_node 8 -m tbcm.encode prompts.parquet cache --config configs/sana.yaml text.max_tokens=120
  torchrun --nproc_per_node 8 -m tbcm.train configs/sana.yaml data.prompts=prompts.parquet text.cache=cache

It may be stopped at any time: the same command goes on, and keeps every file that is there and whole. All nodes must
see OUT. bf16 is exact where the encoder's weights are bf16 (auto: on CUDA from Ampere on) and takes 1.4 MB for 300
tokens of Gemma-2; padding is not stored. Training refuses a cache of another encoder, instruction, text.max_tokens or
other prompts, and of a damaged one those files that are missing or cut; --verify finds a single wrong bit.
Of a teacher of another family than Sana all that its pipeline tells its network is stored, for the sizes in resolution.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.encode",
        description="Encode the prompts of a file once, for training without a text encoder (text.cache=OUT).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompts", type=source_argument, help="'icons', or files as in data.prompts (data.column: which column)"
    )
    parser.add_argument("out", type=path_argument, help="the folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, such as text.max_tokens=120")
    parser.add_argument(
        "--config", type=path_argument, required=True, help="of the training: says which encoder, and of which teacher"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the stored states (default: bf16)")
    parser.add_argument("--batch", type=int, default=32, help="prompts that are encoded at once (default: 32)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--verify", action="store_true", help="check every bit; encode what is damaged again")
    return parser.parse_intermixed_args()


@command
@failure.reported
def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch}: give at least 1")
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompts": arguments.prompts})})

    from tbcm.runtime.job import job

    with job(arguments.out, arguments.device) as device:
        encode_prompts(
            config,
            str(arguments.out),
            device,
            dtype=DTYPES[arguments.dtype],
            batch=arguments.batch,
            verify=arguments.verify,
        )


def encode_prompts(
    config: Config, out: str, device: torch.device, *, dtype: str, batch: int = 32, verify: bool = False
) -> None:
    """Fills the folder `out` with the states of data.prompts. Every rank calls it and takes its share of the files."""
    from tbcm.data.condition_writer import ConditionWriter
    from tbcm.data.embedding_writer import CacheWriter
    from tbcm.data.embeddings import NULL
    from tbcm.data.sharded import progress_bar, share
    from tbcm.models.families.pipeline import FamilyPipeline
    from tbcm.models.families.text import RecordedConditions
    from tbcm.runtime import distributed
    from tbcm.setup.networks import pipeline_of
    from tbcm.setup.text import build_encoder, build_prompts, build_text, text_identity, text_weights

    prompts = build_prompts(config.model_copy(update={"out": out}))
    computed_in = str(text_weights(config, device)).removeprefix("torch.")
    family = isinstance(pipeline_of(config), FamilyPipeline)
    kind = ConditionWriter if family else CacheWriter
    writer = kind(Path(out), {**text_identity(config), "computed_in": computed_in, "dtype": dtype})
    distributed.run_on_main(lambda: writer.begin(prompts))
    todo, whole = share(writer.names, writer.is_whole)
    if verify:
        mine = [name for name in writer.names if name in whole][distributed.rank() :: distributed.world_size()]
        todo += [name for name in mine if not writer.is_whole(name, verify=True)]
    if todo:
        text = build_text(config, device) if family else None
        encoder = None if family else build_encoder(config, device)
        with progress_bar(sum(len(writer.prompts(name)) for name in todo), "prompt") as progress:
            for name in todo:
                if isinstance(writer, ConditionWriter):
                    assert isinstance(text, RecordedConditions)
                    writer.encode(text, name, batch, config.resolution)
                    progress.update(len(writer.prompts(name)))
                else:
                    assert encoder is not None
                    writer.write(name, _encoded(encoder, writer.prompts(name), batch, name != NULL, progress))
    distributed.barrier()
    manifest = distributed.run_on_main(lambda: writer.finish(prompts))
    logging.getLogger("tbcm").info("%s", summary(manifest, out, kept=len(whole)))


def _encoded(
    encoder: TextEncoder, prompts: list[str], batch: int, instruct: bool, progress: tqdm[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        yield encoder.encode(some, instruct=instruct)
        progress.update(len(some))


def summary(manifest: dict[str, Any], out: str, kept: int) -> str:
    files = manifest["files"].values()
    size, tokens = sum(file["bytes"] for file in files), sum(file.get("tokens", 0) for file in files)
    counted = f"{out}: {manifest['distinct_prompts']:,} distinct prompts of {manifest['prompts']:,}"
    there = f"{size / 1e6:,.1f} MB" + f" ({kept:,} files were there already)" * bool(kept)
    if "prompts_that_fill_max_tokens" not in manifest:
        return f"{counted}, {there}"
    longest, full = manifest["made_with"]["text.max_tokens"], manifest["prompts_that_fill_max_tokens"]
    return (
        f"{counted}, {tokens:,} tokens, {there};"
        f" {full:,} prompts fill all {longest} tokens, what they have beyond is cut off"
    )


if __name__ == "__main__":
    sys.exit(main())
