"""A pipeline of any family, as a folder or on a hub, with what training and sampling ask of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tbcm.config.resolution import Size, shown_size
from tbcm.errors import UserError, first_line
from tbcm.method.formulation import Formulation
from tbcm.models.families.codec import Codec, Pixels, Video, codec_of
from tbcm.models.families.export import FewSteps, few_steps
from tbcm.models.families.family import Facts, Family
from tbcm.models.families.rows import family_of
from tbcm.models.families.text import UNUSED, RecordedConditions, encoder_class, encoders_of
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline, check_multiple

DEFAULT_SIZE = 1024
"""Pixels, of a network that says nothing of it."""


@dataclass(frozen=True)
class FamilyPipeline:
    """Of a pipeline class that has a row in `tbcm.models.families.rows`, for images of any size that it makes.

    Raises (from every property and method):
        UserError: files that are missing or malformed, a class without a row.
    """

    files: Pipeline

    @property
    def path(self) -> str:
        return self.files.path

    @property
    def location(self) -> str:
        return self.files.location

    @property
    def revision(self) -> str | None:
        return self.files.revision

    @property
    def index(self) -> dict[str, Any]:
        return self.files.index

    @cached_property
    def family(self) -> Family:
        return family_of(str(self.index.get("_class_name"))).of_frames(self.frames)

    @property
    def frames(self) -> int:
        """Of a sample."""
        return self.files.frames

    @cached_property
    def scheduler(self) -> Any:
        """The teacher's own."""
        return self._guarded("scheduler", lambda cls: cls.from_pretrained(self.location, **self._of("scheduler")))

    @cached_property
    def network_config(self) -> dict[str, Any]:
        return self._config(self.family.network)

    @cached_property
    def codec(self) -> Codec:
        unit = getattr(self.formulation, "sigma_data", 1.0)  # EDM's data have another std than 1
        if not self.index.get("vae"):
            return Pixels(self.network_config, unit)
        return codec_of(self.index["vae"][1], self._config("vae"), unit, self.frames)

    @cached_property
    def formulation(self) -> Formulation:
        """Of any size: `at` gives that of one."""
        try:
            return self.family.formulation(Facts(self.network_config, self.scheduler))
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def t_max(self) -> float:
        return self.formulation.t_max

    @property
    def compression(self) -> int:
        """Pixels per latent, along one side."""
        return self.codec.compression

    @cached_property
    def _factor(self) -> int:
        """As `compression`, which needs the formulation."""
        if not self.index.get("vae"):
            return 1
        return codec_of(self.index["vae"][1], self._config("vae")).compression

    @property
    def text_parts(self) -> list[str]:
        """Its components that encode prompts, by name."""
        others = (self.family.network, "vae", "scheduler")
        return sorted(part for part, entry in self.index.items() if isinstance(entry, list) and part not in others)

    @property
    def channels(self) -> tuple[int, ...]:
        """Shape of one sample's latents as its codec has them, without height and width."""
        return self.codec.shape(0, 0)[:-2]

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of what is trained on."""
        return self.family.layout.shape(self.codec.shape(*size))

    def check_size(self, size: Size) -> None:
        """Raises UserError where the network makes no images of it, or no videos of so many frames."""
        self._check_frames()
        check_multiple(size, self._token)
        rows, columns = size[0] // self._token, size[1] // self._token
        if not self.family.sized and size != (self.trained_size,) * 2:
            raise UserError(
                f"resolution = {shown_size(size)}: {self.family.pipeline} makes images of one size only:"
                f" set resolution={self.trained_size}"
            )
        most = self.family.most_tokens(self.network_config)
        if most is not None and max(rows, columns) > most:
            raise UserError(
                f"resolution = {shown_size(size)}: this teacher has positions for sides of up to {most * self._token}"
            )

    def _check_frames(self) -> None:
        if self.frames == 1:
            return
        if not self.family.makes_videos or not isinstance(self.codec, Video):
            raise UserError(f"frames = {self.frames}: {self.family.pipeline} makes images; leave it out")
        if (self.frames - 1) % (step := self.codec.temporal):
            raise UserError(f"frames = {self.frames}: should be 1, {1 + step}, {1 + 2 * step}, ... for this teacher")

    @property
    def _token(self) -> int:
        """Pixels of a token, along one side."""
        return self.compression * self.family.patch(self.network_config)

    def _formulation_at(self, size: Size) -> Formulation:
        return self.formulation.at((size[0] // self._token) * (size[1] // self._token))

    @property
    def trained_size(self) -> int:
        """Pixels, both ways, as far as the network's configuration tells."""
        side = self.network_config.get("sample_size")
        return int(side) * self._factor if isinstance(side, int) else DEFAULT_SIZE

    @property
    def scaling_factor(self) -> float:
        """Of the autoencoder's configuration, 1 without one."""
        return float(self.codec.config.get("scaling_factor") or 1.0)

    def few_steps(self, steps: int, size: Size) -> FewSteps:
        """How plain diffusers runs its student."""
        return few_steps(self.family, self._formulation_at(size), self.scheduler, steps)

    def teacher_times(self, steps: int, size: Size) -> Tensor:
        return self._formulation_at(size).schedule(steps)

    def student_times(self, steps: int, size: Size) -> list[float]:
        """Those at which an exported student is run, so that both give the same images."""
        try:
            return self.few_steps(steps, size).times
        except UserError:  # cannot be exported: an even grid
            return [self.t_max * (1 - i / steps) for i in range(steps)]

    def load_network(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        part = self.family.network
        module: nn.Module = self.files.load(part, self._class(part), dtype, strict=True)
        return module.to(device).eval().requires_grad_(False)

    def load_teacher(self, dtype: torch.dtype, device: torch.device, *, compiled: bool = False) -> DiffusersNetwork:
        """Frozen, with weights in `dtype`."""
        return self.teacher_of(self.load_network(dtype, device), compiled=compiled)

    def teacher_of(self, backbone: nn.Module, *, compiled: bool = False) -> DiffusersNetwork:
        """The frozen teacher with this backbone."""
        net = DiffusersNetwork(backbone, self.family, self.formulation, self.channels, compiled=compiled)
        net.eval().requires_grad_(False)
        return net

    def untrained(self, part: str) -> Any:
        """A component with the first weights of its class."""
        return self._guarded(part, lambda cls: cls.from_config(self._config(part)))

    def load_vae(self, dtype: torch.dtype) -> Any:
        """None for a network of pixels."""
        if not self.index.get("vae"):
            return None
        return self.files.load("vae", self._class("vae"), dtype).eval().requires_grad_(False)

    def load_text(self, dtype: torch.dtype, device: torch.device) -> RecordedConditions:
        encoders = {name: encoder.to(device) for name, encoder in self.load_encoders(dtype).items()}
        return RecordedConditions(self.text_pipeline(encoders, dtype, device), self.family)

    def load_encoders(self, dtype: torch.dtype, without: Container[str] = ()) -> dict[str, nn.Module]:
        """Its text encoders by name, frozen, but for some."""
        wanted = {part: cls for part, cls in self.encoder_classes.items() if part not in without}
        loaded = {part: self.files.load(part, cls, dtype, heads=True) for part, cls in wanted.items()}
        return {part: encoder.eval().requires_grad_(False) for part, encoder in loaded.items()}

    @property
    def encoder_classes(self) -> dict[str, Any]:
        """Of the networks among `text_parts`, by name."""
        found = {part: encoder_class(self.index[part]) for part in self.text_parts if part not in UNUSED}
        return {part: cls for part, cls in found.items() if cls is not None}

    def text_pipeline(self, encoders: Mapping[str, nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
        """The pipeline with these `encoders`, and without the weights of its network and its autoencoder."""
        try:
            return encoders_of(self.location, self.index, self.family, dtype, device, encoders, **self.at_revision)
        except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.path}: its text encoders cannot be loaded ({first_line(error)})") from None

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> scaled latents xbar_0 [N, C, h, w], fp32."""
        return self.codec.encode(vae, images)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return self.codec.decode(vae, latents)

    def _of(self, part: str) -> dict[str, Any]:
        return {"subfolder": part, **self.at_revision}

    @property
    def at_revision(self) -> dict[str, Any]:
        """What tells a `from_pretrained` which version of a hub's repository is meant."""
        return {"revision": self.revision} if self.revision else {}

    def _config(self, part: str) -> dict[str, Any]:
        def read(cls: Any) -> dict[str, Any]:
            with torch.device("meta"):  # the defaults of what the file leaves out, without weights
                return dict(cls.from_config(cls.load_config(self.location, **self._of(part))).config)

        return dict(self._guarded(part, read))

    def _class(self, part: str) -> Any:
        entry = self.index.get(part)
        if not isinstance(entry, list) or len(entry) < 2 or not hasattr(diffusers, str(entry[1])):
            raise UserError(f"{self.path}: its {part} is {entry!r} in model_index.json, no class of diffusers")
        return getattr(diffusers, entry[1])

    def _guarded(self, part: str, read: Any) -> Any:
        cls = self._class(part)
        try:
            return read(cls)
        except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.path}: cannot load {part}/ ({first_line(error)})") from None


SANA = "SanaPipeline", "SanaSprintPipeline"
"""Pipeline classes with a network of their own here, faster than the general one."""


def open_pipeline(files: Pipeline) -> Pipeline | FamilyPipeline:
    """What is at a path: Sana's, or that of another family."""
    name = files.index.get("_class_name")
    return files if name in SANA else FamilyPipeline(files)
