"""The call that an export prints, run as printed, gives an image of the student's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline
from helpers import tiny_sana
from PIL import Image
from tiny import tiny_config

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.inference.exporting import write_sprint_pipeline
from tbcm.inference.pipeline_call import call_of
from tbcm.inference.student import Origin
from tbcm.setup.networks import build_student, build_teacher

CPU = torch.device("cpu")


def autoencoder(blocks: int) -> AutoencoderDC:
    """Of 2^(blocks - 1) pixels a latent, as small as may be."""
    many: dict[str, Any] = {
        f"{side}_{what}": [value] * blocks
        for side in ("encoder", "decoder")
        for what, value in (("block_out_channels", 4), ("layers_per_block", 1), ("qkv_multiscales", []))
    }
    return AutoencoderDC(
        latent_channels=4, **many, upsample_block_type="interpolate", downsample_block_type="conv", scaling_factor=0.7
    )


def exported(tmp_path: Path, *, sample_size: int, blocks: int, image_size: Size, dtype: torch.dtype) -> Config:
    """Of a student that was trained at `image_size`, in tmp_path/out."""
    teacher = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(blocks),
        transformer=tiny_sana(caption_channels=384, timestep_scale=0.001, sample_size=sample_size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    teacher.save_pretrained(tmp_path / "teacher")
    config = tiny_config(
        tmp_path / "run", resolution=list(image_size), teacher={"path": str(tmp_path / "teacher"), "null_mask": "own"}
    )
    student = build_student(config, build_teacher(config, CPU))
    write_sprint_pipeline(student, Origin(str(tmp_path / "run"), config, is_run=True), tmp_path / "out", dtype)
    return config


def image_of(code: str) -> Image.Image:
    names: dict[str, Any] = {}
    exec(code.replace('"cuda"', '"cpu"'), names)
    return names["image"]


@pytest.mark.parametrize(
    ("sample_size", "blocks", "image_size"),
    [(8, 6, (256, 256)), (32, 6, (512, 1024)), (8, 4, (64, 64)), (16, 4, (128, 96)), (32, 4, (256, 256))],
)
def test_the_printed_call_gives_the_students_size(
    tmp_path: Path, sample_size: int, blocks: int, image_size: Size
) -> None:
    config = exported(tmp_path, sample_size=sample_size, blocks=blocks, image_size=image_size, dtype=torch.float32)
    code = call_of(config, str(tmp_path / "out"), torch.float32)
    assert image_of(code).size == image_size[::-1]
    assert code in (tmp_path / "out" / "README.md").read_text()


def test_the_call_has_the_students_type_guidance_and_text_length(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, text={"encoder": "gemma2", "max_tokens": 77}, method={"guidance": [2.0, 3.5, 5.0]})
    code = call_of(config, "a 'quoted' folder", torch.bfloat16)
    for part in ("torch_dtype=torch.bfloat16", "guidance_scale=3.5", "max_sequence_length=77", '"a red panda",'):
        assert part in code
    assert "text_encoder=None" not in code
    compile(code, "call", "exec")


def test_a_size_that_the_pipeline_cannot_make_is_said(tmp_path: Path) -> None:
    code = call_of(tiny_config(tmp_path, resolution=40), "out", torch.float32)
    assert "multiples of 32: not of 40 x 40 px" in code
    assert "python -m tbcm.sample out" in code
    compile(code, "call", "exec")
