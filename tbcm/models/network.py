"""A TrigFlow network over any diffusers backbone, differentiated by `torch.func.jvp` (Sana has a faster one)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.config.section import Checkpointing, TangentMode
from tbcm.errors import UserError
from tbcm.method.formulation import Formulation
from tbcm.method.rollout import Velocity
from tbcm.method.trigflow import per_sample
from tbcm.method.types import Condition, Prediction
from tbcm.models.differentiation.compiling import compiled_if_possible
from tbcm.models.differentiation.explicit import Differentiable, ExactTime
from tbcm.models.embedders import GuidanceEmbedding, time_embedders
from tbcm.models.families.family import Family
from tbcm.models.flash import FlashAttention


class DiffusersNetwork(nn.Module):
    """F(u, t | prompt, guidance) of a backbone of any family (see `tbcm.method.types.Network`).

    The backbone is used as it is, with its own code. The guidance scale goes in where the backbone embeds it, else by
    an embedding that is added to the time's.

    Args:
        channels: shape of the codec's latents without batch, height and width: channels, and the frames of a video.
        guided: adds a guidance embedding, zero at first, where the backbone has none.
        guidance_embeds_scale: of that embedding.
        logvar: adds the learned log-variance head of the adaptive weighting, on the time (and guidance) embedding.
        tangent: one_pass computes F and its derivative together; two_pass runs the network twice.
        checkpointing: full recomputes the backbone's blocks in backward, with diffusers' own checkpointing, which a
            derivative cannot pass: it needs tangent=two_pass.
        compiled: torch.compile of the whole network: a graph per kind of call and size of images.

    Raises:
        ValueError: checkpointing that this network cannot do.
    """

    def __init__(
        self,
        backbone: Any,
        family: Family,
        formulation: Formulation,
        channels: tuple[int, ...],
        *,
        guided: bool = False,
        guidance_embeds_scale: float = 1.0,
        logvar: bool = False,
        tangent: TangentMode = "one_pass",
        checkpointing: Checkpointing = "none",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if checkpointing == "selective" or (checkpointing == "full" and tangent == "one_pass"):
            raise ValueError(
                f"student.checkpointing={checkpointing} with student.tangent={tangent}: this backbone does"
                " checkpointing=full with tangent=two_pass, or none"
            )
        self.backbone, self.family, self.formulation, self.channels = backbone, family, formulation, channels
        self.tangent = tangent
        self.embeds_guidance = family.guidance is not None and bool(backbone.config.get("guidance_embeds"))
        found = time_embedders(backbone)
        device = next(backbone.parameters()).device
        self.guidance_embedding = self.logvar_head = None
        if guided and not self.embeds_guidance:
            with torch.device(device):
                self.guidance_embedding = GuidanceEmbedding([one.width for one in found], guidance_embeds_scale)
        if logvar:
            self.logvar_head = nn.Linear(found[0].width, 1, device=device)
            nn.init.zeros_(self.logvar_head.weight)
            nn.init.zeros_(self.logvar_head.bias)
        self._attention: Callable[[], AbstractContextManager[object]] = nullcontext
        self._added: list[Tensor] | None = None
        self._embedding: Tensor | None = None
        for index, embedder in enumerate(found):
            self._follow(embedder.module, index)
        if checkpointing == "full":
            backbone.enable_gradient_checkpointing()
        self._run: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] = self._compute
        if compiled:
            self._run = compiled_if_possible(self._compute, fold=True)

    @property
    def t_max(self) -> float:
        """Where generation starts."""
        return self.formulation.t_max

    @property
    def width(self) -> int:
        """Of the time's embedding."""
        return time_embedders(self.backbone)[0].width

    def use_flash_attention(self) -> None:
        """For a frozen network. Raises ValueError where the package is missing."""
        FlashAttention()
        self._attention = FlashAttention

    @property
    def uses_flash_attention(self) -> bool:
        return self._attention is FlashAttention

    capturable = False  # a backbone may have its own ideas of what is static

    def recompute(self, checkpointing: Checkpointing) -> None:
        """Nothing: diffusers' own checkpointing would run the hooks that look into blocks a second time."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The outermost modules that the backbone says are not to be split, in order."""
        names = set(self.backbone._no_split_modules or ())
        found: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            for child in module.children():
                if type(child).__name__ in names and any(True for _ in child.parameters()):
                    found.append(child)
                else:
                    visit(child)

        visit(self.backbone)
        return found

    def train(self, mode: bool = True) -> DiffusersNetwork:
        """The backbone stays as it is sampled: dropout, of labels too, would make a value and its tangent differ."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        """See `tbcm.method.types.Network`. Raises ValueError where the batch is no multiple of the prompts."""
        condition = _shared_out(u, condition)
        if tangents is None:
            F, _, logvar = self._run(u, t, condition, guidance, None)
            return Prediction(F, None, logvar)
        if self.tangent == "one_pass":
            return Prediction(*self._run(u, t, condition, guidance, tangents))
        with torch.no_grad():
            _, dF, _ = self._run(u, t, condition, guidance, tangents)
        F, _, logvar = self._run(u, t, condition, guidance, None)
        return Prediction(F, dF, logvar)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens, for latents of this size."""
        patch = self.family.patch(self.backbone.config)
        return height // patch, width // patch

    def prepare(self, condition: Condition) -> Condition:
        """Nothing of a prompt can be computed before the network sees the image, in general."""
        return condition

    def guided(self, condition: Condition, null: Condition, guidance: Tensor) -> Velocity:
        """Classifier-free guidance, combined as the pipeline does it, on the network's own answers.

        `condition` and `null` lead with P, `guidance` is [P].
        """
        both = _in_one_batch(null, condition)

        def velocity(u: Tensor, t: Tensor) -> Tensor:
            if both is None:
                without, given = (self.answer(u, t, part, None) for part in (null, condition))
            else:
                without, given = self.answer(torch.cat([u, u]), torch.cat([t, t]), both, None).chunk(2)
            w = per_sample(guidance, given).to(given.dtype)
            return self._trigflow(u, t, self.family.combine(without, given, w))

        return velocity

    def answer(self, u: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        """What the backbone itself says of B samples: a tensor in its own layout (a list stacked)."""
        formulation = self._formulation(u)
        sample = self.family.layout.pack(formulation.input(u, t), self._latents(u))
        condition = self._typed(condition)
        sample = [row.to(self._dtype) for row in sample] if isinstance(sample, list) else sample.to(self._dtype)
        with self._attention(), ExactTime():
            given = guidance if self.embeds_guidance else None
            answer = self.family.call(self.backbone, sample, formulation.time(t), condition, given)
        return torch.stack(list(answer)) if isinstance(answer, (list, tuple)) else answer

    def features(
        self, u: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Tokens [B, T, D] after the blocks `layers` (ascending, from 0), with a graph to u; later blocks do not run.

        For discriminators on a frozen network (arguments as for `forward`).

        Raises:
            UserError: a block whose output is not the image's tokens alone.
        """
        blocks, found = self.blocks, {}

        class _EnoughError(Exception):
            pass

        def note(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                found[index] = _tokens(out)
                if index == layers[-1]:
                    raise _EnoughError

            return hook

        with ExitStack() as hooks:
            for index in layers:
                hooks.callback(blocks[index].register_forward_hook(note(index)).remove)
            with suppress(_EnoughError):
                self.answer(u, t, _shared_out(u, condition), guidance)
        wanted = u.shape[0], math.prod(self.grid(*u.shape[-2:])), self.width
        for index in layers:
            if found[index].shape != wanted:
                raise UserError(
                    f"method.adversary.layers: block {index} of {self.family.pipeline} gives"
                    f" {list(found[index].shape)}, not the image's tokens {list(wanted)} alone; choose others"
                )
        return [found[index] for index in layers]

    # Inside

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def _typed(self, condition: Condition) -> Condition:
        """Text states in the weights' dtype; what counts or positions (integers, fp64) as it is."""
        cast = {k: v.to(self._dtype) if v.dtype in _STATES else v for k, v in condition.tensors.items()}
        return Condition(cast, condition.static)

    def _trigflow(self, u: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        unpacked = self.family.layout.unpack(answer, self._latents(u)).to(u.dtype)
        return self._formulation(u).output(u, t, unpacked)

    def _latents(self, u: Tensor) -> tuple[int, ...]:
        """Shape of the codec's latents for one sample of `u`, in which a video's frames stand one below the other."""
        return *self.channels, u.shape[-2] // math.prod(self.channels[1:]), u.shape[-1]

    def _formulation(self, u: Tensor) -> Formulation:
        return self.formulation.at(math.prod(self.grid(*u.shape[-2:])))

    def _compute(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None,
        tangents: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """F, its derivative without a graph, and logvar."""

        def both(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.guidance_embedding is not None:
                if guidance is None:
                    raise ValueError("this network embeds its guidance scale: pass `guidance` [B]")
                self._added = self.guidance_embedding(guidance)
            F = self._trigflow(u, t, self.answer(u, t, condition, guidance))
            embedding, self._embedding, self._added = self._embedding, None, None
            return F, embedding

        if tangents is None:
            F, embedding = both(u, t)
            return F, None, self._logvar(embedding)
        with Differentiable():
            F, dF, embedding = torch.func.jvp(both, (u, t), tangents, has_aux=True)  # type: ignore[misc]
        return F, dF.detach(), self._logvar(embedding)

    def _logvar(self, embedding: Tensor | None) -> Tensor | None:
        if self.logvar_head is None or embedding is None:
            return None
        with torch.autocast(embedding.device.type, enabled=False):
            pooled = embedding.flatten(1, -2).mean(1) if embedding.dim() > 2 else embedding
            return self.logvar_head(pooled.to(self.logvar_head.weight.dtype)).squeeze(-1)

    def _follow(self, module: nn.Module, index: int) -> None:
        """Adds the guidance's embedding to what an embedder of time gives, and notes the first one's.

        Not by a forward hook: what `nn.Module` keeps of a hooked call would be an output of a compiled graph, which a
        value inside torch.func.jvp cannot be. (Of a copied module the class's own forward is called, not its model's.)
        """

        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = type(this).forward(this, *args, **kwargs)
            if self._added is not None:
                g = self._added[index].to(out.dtype)
                out = out + g.reshape(g.shape[0], *(1,) * (out.dim() - 2), -1)
            if index == 0:
                self._embedding = out
            return out

        module.forward = MethodType(forward, module)


_STATES = torch.float32, torch.float16, torch.bfloat16


def _shared_out(u: Tensor, condition: Condition) -> Condition:
    if u.shape[0] % len(condition):
        raise ValueError(f"{u.shape[0]} samples cannot be shared out evenly over {len(condition)} prompts")
    return condition.repeat(u.shape[0] // len(condition))


def _in_one_batch(null: Condition, condition: Condition) -> Condition | None:
    """Both branches in one batch; None where that would pad text that no mask covers."""
    masked = any("mask" in name for name in condition.tensors) or any("#" in name for name in condition.tensors)
    same = all(null.tensors[k].shape[1:] == v.shape[1:] for k, v in condition.tensors.items())
    return Condition.cat(null, condition) if same or masked else None


def _tokens(out: Any) -> Tensor:
    """A block's image tokens [B, T, D]: of (text, image) pairs the image's, of feature maps their pixels."""
    if isinstance(out, tuple):
        out = out[-1]
    return out.flatten(2).mT if out.dim() == 4 else out
