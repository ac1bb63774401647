"""Teachers from diffusers folders or hub ids, students from teachers, and students back to diffusers folders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.models.identity import key_of_model, model_identity
from tbcm.models.sana import SanaTrigFlow

FLOW_STEPS = 1000
"""diffusers' schedulers count flow-matching time from 0 to 1,000."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline folder or hub id: what is in it, without loading it. `path` 'emoji' is the shipped one."""

    path: str
    revision: str | None = None
    given_timestep_scale: float | None = None

    @cached_property
    def location(self) -> str:
        if self.path == "emoji":
            return str(resources.files("tbcm.emoji") / "assets" / "teacher")
        if Path(self.path).exists() or self.path.startswith((".", "/", "~")):
            return str(Path(self.path).expanduser())
        return self.path  # a hub id

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json. Raises UserError where there is none."""
        from diffusers import DiffusionPipeline

        local = Path(self.location)
        try:
            if local.is_dir():
                index: dict[str, Any] = json.loads((local / "model_index.json").read_text(encoding="utf-8"))
            else:
                index = dict(DiffusionPipeline.load_config(self.location, revision=self.revision))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: no diffusers pipeline there (model_index.json: {_first_line(error)});"
                " give a folder that diffusers' save_pretrained wrote, or a hub id that can be reached"
            ) from None
        return index

    def config(self, part: str, cls: Any) -> dict[str, Any]:
        try:
            return dict(cls.load_config(self.location, subfolder=part, revision=self.revision))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: no readable {part}/config.json ({_first_line(error)})") from None

    def load(self, part: str, cls: Any, dtype: torch.dtype | None) -> Any:
        """`cls.from_pretrained` of one part; a missing or damaged file becomes a UserError."""
        options = {} if dtype is None else {"torch_dtype": dtype}
        try:
            return cls.from_pretrained(self.location, subfolder=part, revision=self.revision, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot load {part}/ ({_first_line(error)})") from None

    @cached_property
    def timestep_scale(self) -> float:
        """What the transformer is given at flow-matching time s, divided by s.

        SanaPipeline passes scheduler times (up to 1,000) times the transformer's timestep_scale; SanaSprintPipeline
        passes s itself and ignores that key.
        """
        if self.given_timestep_scale is not None:
            return self.given_timestep_scale
        if self.index.get("_class_name") == "SanaSprintPipeline":
            return 1.0
        return FLOW_STEPS * float(self.config("transformer", SanaTransformer2DModel).get("timestep_scale", 1.0))

    @cached_property
    def compression(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.config("vae", AutoencoderDC)["encoder_block_out_channels"]) - 1))

    @cached_property
    def sampling_shift(self) -> float:
        """The shift of the folder's flow-matching scheduler (1 where it has none)."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.config("scheduler", FlowMatchEulerDiscreteScheduler)
        return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)

    def load_transformer(self, dtype: torch.dtype) -> SanaTransformer2DModel:
        transformer = self.index.get("transformer")
        if not isinstance(transformer, list) or transformer[-1] != "SanaTransformer2DModel":
            raise UserError(
                f"{self.path}: its transformer is {transformer[-1] if isinstance(transformer, list) else 'missing'};"
                " supported: SanaTransformer2DModel"
            )
        return self.load("transformer", SanaTransformer2DModel, dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderDC:
        return self.load("vae", AutoencoderDC, dtype).eval().requires_grad_(False)


def freeze(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def load_teacher(pipeline: Pipeline, dtype: torch.dtype, device: torch.device, **options: Any) -> SanaTrigFlow:
    """The frozen teacher, with weights in `dtype`; `options` go to SanaTrigFlow."""
    backbone = pipeline.load_transformer(dtype).to(device)
    net = SanaTrigFlow(backbone, timestep_scale=pipeline.timestep_scale, differentiable=False, **options)
    freeze(net)
    return net


def student_from_teacher(
    teacher: SanaTrigFlow, *, guidance_embeds_scale: float | None = None, **options: Any
) -> SanaTrigFlow:
    """A trainable fp32 student that starts equal to the conditional teacher, on the teacher's device; `options` go to
    SanaTrigFlow.

    Where the teacher embeds no guidance the student gets an embedding whose last layer is zero, and the time
    embedding's keys are renamed to where diffusers keeps them beside one. It is of guidance times
    `guidance_embeds_scale` (default: as the teacher's configuration has it): its sines have frequencies of at most 1,
    so that by 0.1 guidances 3 and 5 differ by a twentieth of their embeddings' length, and by 1 by half of it.

    Raises:
        UserError: another scale for a teacher that embeds guidance itself.
    """
    config = {key: value for key, value in teacher.backbone.config.items() if not key.startswith("_")}
    if guidance_embeds_scale is not None:
        if config["guidance_embeds"] and guidance_embeds_scale != config["guidance_embeds_scale"]:
            raise UserError(
                f"student.guidance_embeds_scale = {guidance_embeds_scale:g}: the teacher embeds guidance itself, times"
                f" {config['guidance_embeds_scale']:g}; leave it out"
            )
        config["guidance_embeds_scale"] = guidance_embeds_scale
    with torch.device(next(teacher.parameters()).device):
        backbone = SanaTransformer2DModel(**config | {"guidance_embeds": True})
    state = {
        key.replace("time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."): value
        for key, value in teacher.backbone.state_dict().items()
    }
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    new = [key for key in missing if not key.startswith("time_embed.guidance_embedder.")]
    if new or unexpected:
        raise ValueError(f"teacher and student differ: missing {new}, unexpected {unexpected}")
    if missing:
        last = backbone.time_embed.guidance_embedder.linear_2
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return SanaTrigFlow(backbone.train(), timestep_scale=teacher.timestep_scale, logvar=True, **options)


@torch.no_grad()
def encode_images(vae: AutoencoderDC, images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] -> scaled latents xbar_0 [N, C, h, w], fp32."""
    return vae.encode(images.to(vae.dtype), return_dict=False)[0].float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderDC, latents: Tensor) -> Tensor:
    """Scaled latents xbar_0 [N, C, h, w] -> images [N, 3, H, W] in about [-1, 1], fp32."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()


def black_latent(pipeline: Pipeline, image_size: int, folder: Path, device: torch.device) -> Tensor:
    """The scaled latent [C, h, w] of an all-black image (fp32): the teacher's own, else computed once into `folder`,
    under a name that tells teachers apart."""
    from safetensors.torch import save_file

    from tbcm.runtime.files import atomic_path

    key = str(image_size)
    vae = model_identity(pipeline.location, pipeline.revision, ["vae"])
    name = hashlib.sha256(key_of_model(vae).encode()).hexdigest()[:8]
    cache = folder / f"black_latent-{name}.safetensors"
    for file in (Path(pipeline.location) / "black_latent.safetensors", cache):
        if file.is_file():
            try:
                stored = load_file(file)
            except SafetensorError as error:
                raise UserError(f"{file}: damaged ({_first_line(error)}); delete it to have it made again") from None
            if key in stored:
                return stored[key].to(device)
    encoder = pipeline.load_vae(torch.float32).to(device)
    black = encode_images(encoder, -torch.ones(1, 3, image_size, image_size, device=device))[0]
    with atomic_path(cache) as temporary:
        save_file({key: black.cpu()}, temporary)
    return black


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
