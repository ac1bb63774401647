"""A network's or an autoencoder's tensors in diffusers' names, by diffusers' own conversions and by ours of Sana."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from tbcm.errors import UserError, first_line
from tbcm.models.conversion.groups import NETWORK
from tbcm.models.conversion.renaming import Converted, Tensors
from tbcm.models.sana.published import from_published


def from_single_file(state: Tensors, model: Any, where: str) -> Converted:
    """The tensors of `model`, of a class of diffusers; `state` is as it was published, without a prefix.

    Raises:
        UserError: a class that diffusers converts no files of, or tensors that it cannot convert.
    """
    own = model.state_dict().keys()
    if len(own & state.keys()) > 0.9 * len(
        own
    ):  # diffusers' names already; Z-Image's are so by half as it is published
        return Converted(state)
    if isinstance(model, diffusers.SanaTransformer2DModel):  # diffusers' conversion drops norms of queries and keys
        return from_published(state, guidance_embeds=model.config.guidance_embeds)
    return _by_diffusers(state, model, where)


def _by_diffusers(state: Tensors, model: Any, where: str) -> Converted:
    """What `from_single_file` of the class makes of them. That itself says nothing of tensors that it does not look at,
    and of those that it misses not which they are: so they are looked for here."""
    name = type(model).__name__
    known = [each.__name__ for each in type(model).__mro__ if each.__name__ in SINGLE_FILE_LOADABLE_CLASSES]
    if not known:
        raise UserError(
            f"{where}: diffusers converts no single file of a {name}; it should have diffusers' own names, as"
            f" save_pretrained writes them (such as {min(model.state_dict())}), and has {min(state)}"
        )
    prefix = NETWORK if isinstance(model, diffusers.UNet2DConditionModel) else ""  # which that one looks for
    given = {prefix + key: value for key, value in state.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[known[0]]["checkpoint_mapping_fn"]
    try:
        converted = convert(checkpoint=given, config=dict(model.config))
    except KeyError as error:
        raise UserError(f"{where}: no {name} as they are published: {error.args[0]} is missing") from None
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"{where}: no {name} as they are published ({first_line(error)})") from None
    tensors = {key: value for key, value in converted.items() if value is not None}
    # What it renames stays where it is in memory; what it splits or joins it takes out of `given`.
    places = {value.data_ptr() for value in tensors.values()}
    unknown = [key.removeprefix(prefix) for key, value in given.items() if value.data_ptr() not in places]
    return Converted(tensors, {}, unknown)
