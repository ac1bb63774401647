"""The table of families. A new backbone is a new row; docs/backbones.md says how to find its facts."""

from __future__ import annotations

import math
from typing import Any

from tbcm.errors import UserError
from tbcm.method.formulation import Flow
from tbcm.models.families.family import Facts, Family, diffusion, flow, from_given, renormed, unit_flow
from tbcm.models.families.layout import Frames, Patches, Tokens, Video


def _sana_time(facts: Facts) -> Flow:
    return flow(facts, scale=1000.0 * float(facts.network.get("timestep_scale", 1.0)))


def _data_to_noise(facts: Facts) -> Flow:
    """The network's time and answer count from noise to data."""
    return flow(facts, scale=1.0, reverse=True, sign=-1)


def _cogview4_time(facts: Facts) -> Flow:
    """Alone in giving its network the time before the shift, which depends on the number of tokens."""
    c = facts.scheduler.config
    return flow(facts, shift_of=lambda tokens: (tokens / c.base_image_seq_len) ** 0.5 * c.max_shift + c.base_shift)


def _labels(prompts: Any) -> dict[str, Any]:
    """Classes of ImageNet by number, or by the pipeline's own names for them."""
    try:
        return {"class_labels": [int(prompt) for prompt in prompts]}
    except ValueError as error:
        raise UserError(f"prompts of a class-conditional teacher are numbers of classes: {error}") from None


def _rotary(config: Any) -> int:
    """Of tables for the text's, the rows' and the columns' places."""
    return int(min(config["axes_lens"][1:]))


_UNET: dict[str, Any] = {"network": "unet", "sample": "sample", "formulation": diffusion}
_NO_BINS = {"use_resolution_binning": False}
"""Images of the size that is asked for, not of the nearest of a list."""
_IDS = ("img_ids", "txt_ids")

ROWS = (
    Family("StableDiffusionPipeline", **_UNET),
    Family("StableDiffusionXLPipeline", **_UNET),
    Family("KolorsPipeline", **_UNET),
    Family(
        "DDPMPipeline",
        **_UNET,
        prompts=lambda prompts: {"batch_size": len(prompts)},
        guided=lambda count: {},
        unguided={},
        times="grid",
        sized=False,
    ),
    Family(
        "DiTPipeline", formulation=diffusion, prompts=_labels, null_first=False, times="grid", sized=False, example="0"
    ),
    Family("PixArtAlphaPipeline", formulation=diffusion, always=_NO_BINS),
    Family("PixArtSigmaPipeline", formulation=diffusion, always=_NO_BINS),
    Family("StableDiffusion3Pipeline", most_tokens=lambda config: config["pos_embed_max_size"]),
    Family("SanaPipeline", formulation=_sana_time, always=_NO_BINS),
    Family(
        "WanPipeline",
        layout=Video(),
        times="terminal",
        always={"num_frames": 1},
        output="frames",
        most_tokens=lambda config: config["rope_max_seq_len"],
    ),
    Family("CogView4Pipeline", formulation=_cogview4_time, ragged=("encoder_hidden_states",), times="timesteps"),
    Family(
        "AuraFlowPipeline",
        formulation=unit_flow,
        most_tokens=lambda config: math.isqrt(config["pos_embed_max_size"]),
    ),
    Family(
        "FluxPipeline",
        formulation=unit_flow,
        layout=Patches(),
        static=_IDS,
        guidance="guidance",
        unguided={},
    ),
    Family("Flux2KleinPipeline", formulation=unit_flow, layout=Tokens()),
    Family("ChromaPipeline", formulation=unit_flow, layout=Patches(), static=_IDS),
    Family(
        "QwenImagePipeline",
        formulation=unit_flow,
        layout=Patches(),
        combine=renormed,
        masks={"encoder_hidden_states": "encoder_hidden_states_mask"},
        guided=lambda count: {"negative_prompt": [" "] * count, "true_cfg_scale": 4.0},
        unguided={"true_cfg_scale": 1.0},
    ),
    Family("Lumina2Pipeline", formulation=_data_to_noise, combine=renormed, most_tokens=_rotary),
    Family(
        "ZImagePipeline",
        formulation=_data_to_noise,
        sample="x",
        time="t",
        layout=Frames(),
        ragged=("cap_feats",),
        by_list=True,
        combine=from_given,
        null_first=False,
        unguided={"guidance_scale": 0.0},
        most_tokens=_rotary,
    ),
)

FAMILIES = {row.pipeline: row for row in ROWS}


def family_of(pipeline: str) -> Family:
    """The row of a pipeline class, by its name. Raises UserError where there is none."""
    if pipeline not in FAMILIES:
        raise UserError(
            f"{pipeline}: no such family; a row in tbcm/models/families/rows.py needs its network's arguments, time,"
            f" sign and layout of latents (docs/backbones.md). Known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[pipeline]
