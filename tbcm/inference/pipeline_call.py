"""How an exported student is called with plain diffusers, whose defaults are for Sana-Sprint: 1024 px in two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tbcm.config import Config
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.loading import AnyPipeline
from tbcm.models.pipeline import Pipeline

if TYPE_CHECKING:
    from tbcm.inference.student import Origin

ADAPTER = "pytorch_lora_weights.safetensors"
"""diffusers' name."""
PIPELINE_MULTIPLE = 32
"""SanaSprintPipeline refuses heights and widths that are no multiples of it."""


def call_of(config: Config, folder: str, dtype: torch.dtype, adapter: Sequence[str] = ()) -> str:
    """Python code that makes an image in one step, of the first size that the student was trained on; `adapter`: lines
    that add one to the pipeline in `folder`.

    Height and width are given, and the pipeline's binning is off: it maps every size to one of about 1024 px, and fails
    for a transformer whose sample_size is not 32. `intermediate_timesteps` is for two steps, where its default, 1.3, is
    right; for any other number it is to be None.
    """
    (height, width), minilm = config.resolution[0], config.text.encoder == "minilm"
    if height % PIPELINE_MULTIPLE or width % PIPELINE_MULTIPLE:
        return (
            f"# SanaSprintPipeline makes images whose sides are multiples of {PIPELINE_MULTIPLE}: not of {height} x"
            f" {width} px.\n"
            f'# This does: python -m tbcm.sample {folder} "a red panda" --steps 1\n'
        )
    prompt = ["prompt_embeds=embeds, prompt_attention_mask=mask"] if minilm else ['"a red panda"']
    arguments = [
        *prompt,
        "num_inference_steps=1, intermediate_timesteps=None",
        f"height={height}, width={width}, use_resolution_binning=False",
        f"guidance_scale={config.method.default_guidance:g}",
    ]
    if not minilm and config.text.max_tokens != 300:
        arguments.append(f"max_sequence_length={config.text.max_tokens}")
    parts = ", text_encoder=None, tokenizer=None" if minilm else ""
    lines = [
        "import torch, diffusers",
        *["from tbcm.models.text import MiniLMEncoder"] * minilm,
        "",
        f"pipe = diffusers.SanaSprintPipeline.from_pretrained({folder!r}, torch_dtype={dtype}{parts})",
        *adapter,
        'pipe.to("cuda")',
        *[f'embeds, mask = MiniLMEncoder({config.text.max_tokens}, "cuda").encode(["a red panda"])'] * minilm,
        "image = pipe(",
        *(f"    {argument}," for argument in arguments),
        ").images[0]",
    ]
    return "\n".join(lines) + "\n"


def model_card(config: Config, folder: str, dtype: torch.dtype) -> str:
    """README.md of an exported folder."""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---

A student for 1, 2 or 4 steps, distilled from {config.teacher.path} by tbcm; `tbcm.yaml` is its configuration.

```python
{call_of(config, folder, dtype)}```

`intermediate_timesteps` is for two steps, where its default fits: leave it out there.
"""


def family_call(pipeline: FamilyPipeline, config: Config, folder: str, dtype: torch.dtype, steps: int = 1) -> str:
    """As `call_of`, for a student of any other family: the teacher's own pipeline class, told its times."""
    lines = [f"pipe = diffusers.DiffusionPipeline.from_pretrained({folder!r}, torch_dtype={dtype})"]
    return _code([*lines, *_call(pipeline, config, steps)])


def adapter_call(pipeline: AnyPipeline, config: Config, folder: str, dtype: torch.dtype, steps: int = 1) -> str:
    """As `family_call` (of a SanaSprintPipeline `call_of`), for an adapter in `folder` and the teacher's pipeline."""
    path, weights = config.teacher.path, f'pipe.load_lora_weights({folder!r}, weight_name="{ADAPTER}")'
    if isinstance(pipeline, Pipeline):
        return call_of(config, path, dtype, [_with_scheduler("SCMScheduler", folder), weights])
    named = {"revision": pipeline.revision, "variant": pipeline.files.variant_of(pipeline.family.network)}
    options = "".join(f", {name}={value!r}" for name, value in named.items() if value)
    scheduler = type(pipeline.few_steps(steps, config.resolution[0]).scheduler).__name__
    return _code(
        [
            f"pipe = diffusers.DiffusionPipeline.from_pretrained({path!r}{options}, torch_dtype={dtype})",
            _with_scheduler(scheduler, folder),
            weights,
            *_call(pipeline, config, steps),
        ]
    )


def _with_scheduler(name: str, folder: str) -> str:
    return f'pipe.scheduler = diffusers.{name}.from_pretrained({folder!r}, subfolder="scheduler")'


def _call(pipeline: FamilyPipeline, config: Config, steps: int) -> list[str]:
    few = pipeline.few_steps(steps, size := config.resolution[0])
    guidance = {"guidance_scale": config.method.default_guidance} if pipeline.family.guidance else {}
    arguments = {
        **pipeline.family.prompts([pipeline.family.example]),
        **few.arguments,
        **guidance,
        **pipeline.family.sized_call(size),
    }
    named = (f"    {name}={value!r}," for name, value in arguments.items())
    return ['pipe.to("cuda")', "image = pipe(", *named, f").{pipeline.family.output}[0]"]


def _code(lines: list[str]) -> str:
    return "\n".join(["import torch, diffusers", "", *lines]) + "\n"


def family_card(pipeline: FamilyPipeline, config: Config, folder: str, dtype: torch.dtype) -> str:
    """README.md of an exported folder of any other family."""
    return f"""---
library_name: diffusers
---

A student for 1, 2 or 4 steps, distilled from {config.teacher.path} by tbcm; `tbcm.yaml` is its configuration.

```python
{family_call(pipeline, config, folder, dtype)}```

In four steps:

```python
{family_call(pipeline, config, folder, dtype, 4)}```
"""


def adapter_card(pipeline: AnyPipeline, config: Config, folder: str, dtype: torch.dtype) -> str:
    """README.md of an adapter's folder."""
    scale, at = config.method.default_guidance, ""
    more = "`intermediate_timesteps` is for two steps, where its default fits: leave it out there.\n"
    if isinstance(pipeline, FamilyPipeline):
        if not pipeline.family.guidance:
            at = f" It is for guidance {scale:g} alone, the middle one of those trained on."
        more = f"In four steps:\n\n```python\n{adapter_call(pipeline, config, folder, dtype, 4)}```\n"
    return f"""---
library_name: diffusers
base_model: {config.teacher.path}
tags: [lora]
---

An adapter that makes {config.teacher.path} a student for 1, 2 or 4 steps, distilled by tbcm; `tbcm.yaml` is its
configuration.{at}

```python
{adapter_call(pipeline, config, folder, dtype)}```

{more}
Where its layers have biases (`lora_B.bias`), those are part of it: a program that leaves them out makes other images,
and `pipe.fuse_lora()` refuses them where the network's own layers have none. `python -m tbcm.export` without
`--adapter` writes a whole pipeline instead.
"""


def how_to_call(origin: Origin, dtype: torch.dtype) -> str:
    """The call of an exported folder."""
    pipeline = origin.pipeline
    if pipeline.index.get("_class_name") == "SanaSprintPipeline":
        return call_of(origin.config, origin.path, dtype)
    own = pipeline if isinstance(pipeline, FamilyPipeline) else FamilyPipeline(pipeline)
    return family_call(own, origin.config, origin.path, dtype)
