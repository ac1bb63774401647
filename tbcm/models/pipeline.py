"""A diffusers pipeline, as a folder or on a hub: what is in it, and its parts."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor

from tbcm.config.paths import teacher_folder
from tbcm.config.resolution import Size, shown_size
from tbcm.errors import UserError, first_line
from tbcm.method.formulation import Flow
from tbcm.method.sampling import student_times
from tbcm.method.trigflow import T_MAX
from tbcm.models.architecture import (
    Autoencoder,
    Facts,
    FlowScheduler,
    Gemma,
    SanaTransformer,
    check_config,
    check_facts,
    short,
)
from tbcm.models.families.codec import DeepCompression
from tbcm.models.families.export import evenly
from tbcm.models.json_files import read_json
from tbcm.models.weights import check_files, choose_variant, guarded, load_weights

FLOW_STEPS = 1000
"""diffusers' schedulers count flow-matching time from 0 to 1,000."""

_MODELS: dict[str, tuple[Any, type[Facts]]] = {
    "transformer": (SanaTransformer2DModel, SanaTransformer),
    "vae": (AutoencoderDC, Autoencoder),
}


def check_multiple(size: Size, multiple: int) -> None:
    """Raises UserError for other sides than multiples of what a token covers."""
    if any(side % multiple for side in size):
        raise UserError(f"resolution = {shown_size(size)}: sides should be multiples of {multiple} for this teacher")


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline folder or hub id: what is in it, without loading it. `path` 'icons' is the shipped one;
    `variant` is of its weights' files (such as bf16), None the plain ones or the only ones there are; `frames`: of a
    sample, where it makes videos."""

    path: str
    revision: str | None = None
    given_timestep_scale: float | None = None
    variant: str | None = None
    frames: int = 1

    @cached_property
    def location(self) -> str:
        if self.path == "icons":
            return str(teacher_folder(self.path))
        if os.path.exists(self.path) or self.path.startswith((".", "/", "~")):  # noqa: PTH110 - no error for any path
            return os.path.expanduser(self.path)  # noqa: PTH111
        return self.path  # a hub id

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json. Raises UserError where there is none."""
        return self._read(
            "model_index.json",
            "no diffusers pipeline there",
            "give a folder that diffusers' save_pretrained wrote, or a hub id that can be reached",
        )

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of the transformer or the VAE, with the defaults of what it leaves out.

        Raises:
            UserError: it cannot be read, or says what is not supported.
        """
        cls, facts = _MODELS[part]
        name = f"{part}/config.json"
        return check_config(self._read(name, f"no readable {name}"), facts, cls, self._named(name))

    def untrained(self, part: str) -> Any:
        """The transformer or the VAE, with the first weights of its class."""
        return _MODELS[part][0].from_config(self.config(part))

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
        return FLOW_STEPS * float(self.config("transformer")["timestep_scale"])

    @cached_property
    def compression(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.config("vae")["encoder_block_out_channels"]) - 1))

    @cached_property
    def sampling_shift(self) -> float:
        """The shift of the folder's flow-matching scheduler (1 where it has none)."""
        name = "scheduler/scheduler_config.json"
        scheduler = self._read(name, f"no readable {name}")
        check_facts(scheduler, FlowScheduler, self._named(name))
        return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)

    @property
    def t_max(self) -> float:
        """Where generation starts."""
        return T_MAX

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w), for images of this size."""
        return self.config("transformer")["in_channels"], size[0] // self.compression, size[1] // self.compression

    def check_size(self, size: Size) -> None:
        """Raises UserError where the network makes no images of it."""
        if self.frames > 1:
            raise UserError(f"frames = {self.frames}: {self.path} makes images; leave it out")
        check_multiple(size, self.compression * int(self.config("transformer")["patch_size"]))

    @property
    def trained_size(self) -> int:
        """Pixels, both ways."""
        return int(self.config("transformer")["sample_size"]) * self.compression

    @property
    def scaling_factor(self) -> float:
        return float(self.config("vae")["scaling_factor"])

    def teacher_times(self, steps: int, size: Size) -> Tensor:
        """The teacher's own sampling times, [steps] descending (0 not included): flow-Euler with its shift."""
        return Flow(sampling_shift=self.sampling_shift).schedule(steps)

    def student_times(self, steps: int, size: Size) -> list[float]:
        """SanaSprintPipeline's where it runs the exported student, else those at which Sana's own pipeline is run."""
        return student_times(steps, self.t_max) if abs(self.timestep_scale - 1) <= 1e-6 else evenly(steps)

    def encode(self, vae: AutoencoderDC, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> scaled latents xbar_0 [N, C, h, w], fp32."""
        return DeepCompression(vae.config).encode(vae, images)

    def decode(self, vae: AutoencoderDC, latents: Tensor) -> Tensor:
        """Scaled latents xbar_0 [N, C, h, w] -> images [N, 3, H, W] in about [-1, 1], fp32."""
        return DeepCompression(vae.config).decode(vae, latents)

    def load_transformer(self, dtype: torch.dtype) -> SanaTransformer2DModel:
        """Raises UserError where it, or the VAE and the scheduler beside it, are not supported."""
        self._check_class("transformer")
        channels = self.config("transformer")["in_channels"]
        if self._has("vae"):
            self._check_class("vae")
            if (latent := self.config("vae")["latent_channels"]) != channels:
                raise UserError(
                    f"{self.path}: its VAE has latent_channels = {latent}, its transformer in_channels = {channels}:"
                    " they should be the same"
                )
        if self._has("scheduler"):
            _ = self.sampling_shift
        return self.load("transformer", SanaTransformer2DModel, dtype, strict=True)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderDC:
        self._check_class("vae")
        self.config("vae")
        return self.load("vae", AutoencoderDC, dtype).eval().requires_grad_(False)

    def text_width(self) -> int:
        """Of the text encoder's states, from its configuration. Raises UserError where it is no Gemma-2."""
        name = "text_encoder/config.json"
        config = self._read(name, "no text encoder there", "give a diffusers folder or hub id that has one")
        check_facts(config, Gemma, self._named(name))
        return int(config["hidden_size"])

    def load_text_encoder(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """Gemma's tokenizer and model."""
        from transformers import AutoModel, AutoTokenizer

        self.text_width()
        tokenizer = guarded(
            lambda: AutoTokenizer.from_pretrained(self.location, subfolder="tokenizer", revision=self.revision),
            f"{self.path}: tokenizer/",
        )
        return tokenizer, self.load("text_encoder", AutoModel, dtype)

    def load(self, part: str, cls: Any, dtype: torch.dtype, *, strict: bool = False, heads: bool = False) -> Any:
        """The weights of a part, of a class of diffusers or of transformers.

        Args:
            strict: a part without the variant that was asked for is refused, and not taken as it is.
            heads: the file may hold modules that the class has not.

        Raises:
            UserError: weights that are missing, damaged, or not those that config.json asks for.
        """
        folder, variant = Path(self.location, part), self.variant_of(part, strict=strict)
        if folder.is_dir():
            check_files(folder, variant)
        options: dict[str, Any] = {"revision": self.revision, "variant": variant, "heads": heads}
        return load_weights(cls, self.location, part, dtype, self._named(part), **options)

    def variant_of(self, part: str, *, strict: bool = False) -> str | None:
        """Which variant of a part's weights is taken (None: the plain ones). Raises UserError where it is not clear."""
        return choose_variant(self.names(part), self.variant, self._named(part), strict=strict)

    def names(self, part: str) -> Collection[str]:
        """Of the part's files; none where they cannot be listed."""
        if self.is_local:
            folder = Path(self.location, part)
            return [path.name for path in folder.iterdir()] if folder.is_dir() else []
        from huggingface_hub import HfApi, snapshot_download

        try:
            files = HfApi().list_repo_files(self.location, revision=self.revision)
        except Exception:  # out of reach: what was downloaded before
            try:
                cached = Path(snapshot_download(self.location, revision=self.revision, local_files_only=True))
            except Exception:
                return []
            files = [path.relative_to(cached).as_posix() for path in cached.rglob("*")]
        return [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]

    def _read(self, name: str, missing: str, advice: str = "") -> dict[str, Any]:
        advice = f"; {advice}" if advice else ""
        if self.is_local:
            file = Path(self.location, name)
            if not os.path.isfile(file):  # noqa: PTH113
                raise UserError(f"{self.path}: {missing} (there is no file {name}){advice}")
        else:
            from huggingface_hub import hf_hub_download

            try:
                file = Path(hf_hub_download(self.location, name, revision=self.revision))
            except Exception as error:
                raise UserError(f"{self.path}: {missing} ({name}: {first_line(error)}){advice}") from None
        return read_json(file, self._named(name))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this disk, not a hub's."""
        return os.path.isdir(self.location) or self.location.startswith((".", "/", "~"))  # noqa: PTH112

    def _named(self, name: str) -> str:
        return str(Path(self.location, name)) if self.is_local else f"{self.path}: {name}"

    def _has(self, part: str) -> bool:
        """Whether the index gives a class for it."""
        entry = self.index.get(part)
        return isinstance(entry, list) and len(entry) > 0 and entry[-1] is not None

    def _check_class(self, part: str) -> None:
        wanted = _MODELS[part][0].__name__
        found = self.index[part][-1] if self._has(part) else None
        if found != wanted:
            raise UserError(f"{self.path}: its {part} is {short(found) if found else 'missing'}; supported: {wanted}")
