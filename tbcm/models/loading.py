"""Teachers from pipelines, students from teachers, and what a VAE makes of images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tbcm.config.resolution import Size, shown_size
from tbcm.config.section import Checkpointing, TangentMode
from tbcm.config.sections import Lora
from tbcm.errors import UserError, first_line
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.identity import key_of_model, model_identity
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline

AnyPipeline = Pipeline | FamilyPipeline


def freeze(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def general_student(
    teacher: DiffusersNetwork,
    *,
    guided: bool = True,
    logvar: bool = True,
    lora: Lora | None = None,
    tangent: TangentMode,
    checkpointing: Checkpointing,
    compiled: bool,
    guidance_embeds_scale: float | None,
) -> DiffusersNetwork:
    """A trainable fp32 student of any family that starts equal to the conditional teacher, on the teacher's device.

    Where the teacher embeds no guidance it gets an embedding of it that is zero at first, unless it is not `guided`:
    that of one scale needs none. `logvar`: with the head of the adaptive weighting. With `lora` its weights are the
    teacher's, and adapters on them are trained (see `tbcm.models.lora`).

    Raises:
        UserError: checkpointing that this network cannot do.
    """
    if lora:
        from tbcm.models.lora import add_lora, tied

        backbone = tied(teacher.backbone)
        add_lora(backbone, lora)
    else:
        backbone = _in_fp32(teacher.backbone).requires_grad_()
    try:
        return DiffusersNetwork(
            backbone,
            teacher.family,
            teacher.formulation,
            teacher.channels,
            guided=guided,
            guidance_embeds_scale=guidance_embeds_scale or 1.0,
            logvar=logvar,
            tangent=tangent,
            checkpointing=checkpointing,
            compiled=compiled,
        ).train()
    except ValueError as error:
        raise UserError(str(error)) from None


def _in_fp32(net: nn.Module) -> nn.Module:
    """A copy. Weights are converted as they are copied: in place, those without data (of dry runs) cannot be."""
    parameters = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in net.parameters()}
    buffers = {id(b): b.to(torch.float32, copy=True) for b in net.buffers() if b.is_floating_point()}
    return copy.deepcopy(net, {**parameters, **buffers})


def black_latents(
    pipeline: AnyPipeline, sizes: Sequence[Size], folder: Path, device: torch.device
) -> dict[Size, Tensor]:
    """The scaled latent [C, h, w] of an all-black image of each size (fp32): the teacher's own, else computed once into
    `folder`, under a name that tells teachers apart."""
    from safetensors.torch import save_file

    from tbcm.runtime.files import atomic_path

    vae = model_identity(pipeline.location, pipeline.revision, ["vae"])
    name = hashlib.sha256(key_of_model(vae).encode()).hexdigest()[:8]
    name += f"-{pipeline.frames}-frames" if pipeline.frames > 1 else ""
    own, cache = Path(pipeline.location) / "black_latent.safetensors", folder / f"black_latent-{name}.safetensors"
    given, made = (_stored_latents(pipeline, sizes, file) for file in (own, cache))
    found = made | given
    if missing := [size for size in sizes if size not in found]:
        encoder = pipeline.load_vae(torch.float32)
        encoder = encoder and encoder.to(device)  # there is none where a network makes pixels
        for size in missing:
            black = -torch.ones(1, 3, pipeline.frames * size[0], size[1], device=device)
            made[size] = pipeline.encode(encoder, black)[0].cpu()
        others = load_file(cache) if cache.is_file() else {}  # of an earlier run here, of other sizes
        with atomic_path(cache) as temporary:
            save_file(others | {shown_size(size): latent for size, latent in made.items()}, temporary)
        found |= made
    return {size: found[size].to(device) for size in sizes}


def _stored_latents(pipeline: AnyPipeline, sizes: Sequence[Size], file: Path) -> dict[Size, Tensor]:
    """Those of `sizes` that are in `file`. Raises UserError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({first_line(error)}); delete it to have it made again") from None
    found = {size: stored[shown_size(size)] for size in sizes if shown_size(size) in stored}
    for size, latent in found.items():
        _check_latent(latent, pipeline, size, file)
    return found


def _check_latent(latent: Tensor, pipeline: AnyPipeline, size: Size, file: Path) -> None:
    shape = [*pipeline.latent_shape(size)]
    if list(latent.shape) != shape or latent.dtype != torch.float32:
        raise UserError(f"{file}: {list(latent.shape)} in {latent.dtype} should be {shape} in torch.float32; delete it")
