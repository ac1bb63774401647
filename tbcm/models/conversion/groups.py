"""Which parts of a pipeline a single file holds, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tbcm.errors import UserError
from tbcm.models.conversion.renaming import Converted, Ignored, Tensors, without
from tbcm.models.conversion.text import from_clip, from_first_clip, from_open_clip, from_t5

NETWORK = "model.diffusion_model."
TextConversion = Callable[[Tensors, Any], Converted]


@dataclass(frozen=True)
class Held:
    """What a file holds of one part, by published names without their prefix; `text` converts a text encoder's."""

    tensors: Tensors
    text: TextConversion | None = None


_VAES = "first_stage_model.", "vae."
_TEXTS: tuple[tuple[str, str, TextConversion], ...] = (
    ("cond_stage_model.transformer.", "text_encoder", from_clip),  # Stable Diffusion 1
    ("cond_stage_model.model.", "text_encoder", from_open_clip),  # Stable Diffusion 2
    ("conditioner.embedders.0.transformer.", "text_encoder", from_clip),  # SDXL
    ("conditioner.embedders.1.model.", "text_encoder_2", from_open_clip),
    ("text_encoders.clip_l.transformer.", "text_encoder", from_first_clip),  # SD3, FLUX
    ("text_encoders.clip_g.transformer.", "text_encoder_2", from_clip),
    ("text_encoders.t5xxl.transformer.", "T5EncoderModel", from_t5),
)
_IGNORED: Ignored = (
    (r"model_ema\..*", "an average beside the weights"),
    (r"first_stage_model\.loss\..*", "of the autoencoder's training"),
    (
        r"betas|(sqrt_|log_)?((recip|recipm1|one_minus)_)?alphas_cumprod(_prev)?|posterior_\w+"
        r"|lvlb_weights|logvar|scale_factor|denoiser\.sigmas",
        "noise schedules are the scheduler's to say",
    ),
    (r"v_pred|ztsnr", "what the scheduler says"),
    (r"edm_(mean|std)", "the autoencoder's configuration has them"),
    (r"text_encoders\.\w+\.logit_scale", "of its contrastive training"),
)


def groups_of(
    state: Tensors, classes: Mapping[str, str], network: str, file: str
) -> tuple[dict[str, Held], dict[str, str]]:
    """What a file holds of each part, and why what is left out, for a pipeline with parts of these `classes`. Where no
    name says that it is the `network`'s, all those are that say nothing.

    Raises:
        UserError: there is nothing of the network, or something of a part that the pipeline has not got.
    """
    rest, left_out = without(state, _IGNORED)
    found: dict[str, Held] = {}
    for prefix, part, text in (*((vae, "vae", None) for vae in _VAES), *_TEXTS):
        if own := _taken(rest, prefix):
            name = part if part in classes else next((each for each, c in classes.items() if c == part), None)
            if name is None:
                raise UserError(f"{file}: holds {prefix}*, for which --like has no part: choose another")
            if name in found:
                raise UserError(f"{file}: holds the {name} twice, the second time as {prefix}*")
            found[name] = Held(own, text)
    own = _taken(rest, NETWORK)
    if own and rest:
        raise UserError(f"{file}: {len(rest)} of its tensors are of no part that is known ({min(rest)}, ...)")
    if not own and not rest:
        raise UserError(f"{file}: holds nothing of the network ({network}), but of {', '.join(sorted(found))}")
    return {network: Held(own or rest), **found}, left_out


def _taken(state: Tensors, prefix: str) -> Tensors:
    """Out of `state`, without the prefix."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}
