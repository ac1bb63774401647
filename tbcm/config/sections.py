"""The sections of the configuration: what each key means, its default and what is allowed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tbcm.config.paths import UserData, UserFolder, UserPath
from tbcm.config.section import (
    Checkpointing,
    Derivative,
    NonNegativeInt,
    Precision,
    Section,
    Switch,
    TangentMode,
)


class Teacher(Section):
    """The frozen network that is distilled, and its properties that no file states."""

    path: UserPath = Field(description="'icons' (shipped), a diffusers folder, or a hub id")
    revision: str | None = None
    variant: str | None = Field(
        None, description="of the weights' files, such as bf16; default: the plain ones, or the only ones there are"
    )
    architecture: str | None = Field(
        None,
        description="what --dry-run builds, with random weights, where `path` is no folder on this machine: a name in"
        " docs/backbones.md, such as sdxl",
    )
    precision: Precision = Field(
        "auto",
        description="auto: bf16 weights on CUDA from Ampere on, before it fp16 computation; fp32 on a CPU",
    )
    null_mask: Literal["conditional", "own"] = Field(
        "conditional",
        description="the mask of the unconditional branch: the prompt's (Sana's caption dropout kept it) or its own",
    )
    timestep_scale: PositiveFloat | None = Field(
        None, description="what the network is given at flow time s is s times this; default: as its folder says"
    )
    compile: Switch = Field("auto", description="torch.compile per block; auto: on CUDA")
    cuda_graph: Switch = Field(
        "auto", description="a rollout is captured and replayed as one CUDA graph; auto: on CUDA"
    )
    flash: Switch = Field(
        "auto",
        description="attention of the frozen network by flash-attn; auto: on CUDA, where that package is installed (of"
        " Sana there is none that it could take: attention is linear, or has a mask)",
    )
    half_weights: bool = Field(
        True, description="bf16 computation with bf16 weights; false: with fp32 weights, cast at every call (autocast)"
    )
    fp8: bool = Field(
        False,
        description="large linear layers in fp8 (e4m3; GPUs from Ada on); its error is logged at start",
    )


class Text(Section):
    encoder: Literal["minilm", "gemma2"] = "gemma2"
    path: UserPath | None = Field(
        None, description="folder or hub id with tokenizer/ and text_encoder/; default: the teacher's"
    )
    max_tokens: PositiveInt = 300
    once: bool = Field(
        True,
        description="a prompt's keys and values are projected once a rollout and once a student forward (those of the"
        " null prompt once a run); false: at every point",
    )
    precision: Precision = "auto"
    cache: UserFolder | None = Field(
        None, description="what python -m tbcm.encode wrote: training takes the text from it, and loads no encoder"
    )


class Data(Section):
    prompts: UserData = Field(
        description="'icons' (shipped), a .txt, .jsonl, .csv, .tsv (each also .gz) or .parquet file, a folder of them,"
        " or a pattern such as parts/*.parquet"
    )
    column: str = Field(
        "prompt", description="the column of the prompts (all but .txt); json.prompt is a key inside the column json"
    )
    images: UserData | None = Field(
        None,
        description="for the baselines (method.name): 'icons' (shipped), a folder of images with a metadata.jsonl or a"
        " .txt beside each, WebDataset shards such as shards/*.tar, or .parquet files with images",
    )
    caption_column: str = Field("text", description="the column of the captions in that file, or in the shards' .json")
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05,
        description="share of data.images that may be bad: damaged, or without a caption. They are skipped and told",
    )
    latents: UserFolder | None = Field(
        None,
        description="instead of data.images: what python -m tbcm.encode_images wrote; training loads no VAE and no"
        " images",
    )


class Lora(Section):
    """Low-rank adapters of peft on the teacher's own weights: W + (alpha / rank) B A, of which B A is trained."""

    rank: PositiveInt
    alpha: PositiveFloat | None = Field(None, description="default: the rank, so that B A counts once")
    targets: Annotated[list[str], Field(min_length=1)] | str | None = Field(
        None,
        description="layers that get one, as peft matches them: names or their ends, or one regular expression of whole"
        " names; default: attention's projections and the feed-forward layers",
    )


class Student(Section):
    lora: Lora | None = Field(
        None,
        description="trains adapters on one backbone that teacher and student share in memory, frozen and in the"
        " teacher's precision; null: all weights",
    )
    precision: Precision = Field("auto", description="of the computation; weights that are trained stay fp32")
    tangent: TangentMode = Field(
        "one_pass", description="prediction and tangent from one pass of the network, or from a pass each"
    )
    derivative: Derivative = Field(
        "dual", description="dual: hand-written forward-mode rules; jvp: torch.func.jvp, which does half as much again"
    )
    checkpointing: Checkpointing = Field(
        "none",
        description="what backward recomputes of a block's values (never its tangents): nothing, all but the linear"
        " layers, or everything. A compiled block is at least selective by itself. With a discriminator also of the"
        " teacher's under it",
    )
    compile: Switch = Field("auto", description="torch.compile per block; auto: on CUDA")
    guidance_embeds_scale: PositiveFloat | None = Field(
        None,
        description="what guidance is multiplied by before it is embedded, where the teacher embeds none; default: as"
        " its configuration says, 0.1 for Sana. In a short run the student learns to tell guidances apart only with a"
        " larger one",
    )

    @model_validator(mode="after")
    def _selective_is_dual(self) -> Self:
        if self.checkpointing == "selective" and self.derivative == "jvp" and self.tangent == "one_pass":
            raise ValueError("checkpointing=selective needs derivative=dual (or tangent=two_pass)")
        return self


class Optimizer(Section):
    name: Literal["adamw", "came"] = "came"
    lr: PositiveFloat = 1e-5
    betas: list[float] | None = Field(
        None, description="default: (0.9, 0.999) for adamw, (0.9, 0.999, 0.9999) for came"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    fused: Switch = Field(
        "auto",
        description="clipping, optimizer and EMA in few passes over weights; auto: on CUDA, where csrc/build.py ran",
    )
    clip: PositiveFloat = Field(0.1, description="gradients are clipped to this norm")
    warmup_steps: NonNegativeInt = 0
    cooldown_steps: NonNegativeInt = Field(0, description="last steps of train.steps, over which lr falls to 0")

    @model_validator(mode="after")
    def _betas(self) -> Self:
        wanted = {"adamw": 2, "came": 3}[self.name]
        if self.betas is not None and (len(self.betas) != wanted or not all(0 <= b < 1 for b in self.betas)):
            raise ValueError(f"{self.name} takes {wanted} betas in [0, 1)")
        return self


class Ema(Section):
    kind: Literal["power", "halflife"] = "power"
    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)] = Field(0.1, description="power: relative width of the average")
    halflife_steps: PositiveFloat = Field(50.0, description="halflife: steps until a weight counts half")
    ramp_up: PositiveFloat | None = Field(
        0.05, description="halflife: at most this share of the steps so far; null: off"
    )


class Train(Section):
    steps: PositiveInt = 20000
    max_minutes: PositiveFloat | None = Field(
        None, description="stop (and save) after so many minutes; a resumed run starts counting anew"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    prompts_per_step: PositiveInt = Field(32, description="over all ranks; accumulation follows from it")
    prompts_per_rollout: PositiveInt | None = Field(
        None, description="prompts a rank rolls out at once; default: all of its own"
    )
    prompts_per_micro_batch: PositiveInt | None = Field(
        None, description="prompts of a rollout that a student forward takes: a divisor of their number; default: all"
    )
    points_per_micro_batch: PositiveInt | None = Field(
        None, description="route points a student forward takes of each of these prompts; default: all"
    )
    overlap_rollout: bool = Field(
        False, description="on CUDA: roll out the next prompts beside the student's work on these"
    )
    max_non_finite: PositiveInt = Field(20, description="non-finite updates in a row that stop the run")

    @property
    def prompts_at_once(self) -> int | None:
        """Prompts of a batch, which the student works on; None: all of a rank's."""
        return self.prompts_per_micro_batch or self.prompts_per_rollout

    @model_validator(mode="after")
    def _rollouts_are_whole_batches(self) -> Self:
        rollout, batch = self.prompts_per_rollout, self.prompts_per_micro_batch
        if rollout and batch and rollout % batch:
            raise ValueError(
                f"prompts_per_micro_batch={batch}: should divide prompts_per_rollout={rollout}, which is dealt out in"
                " micro-batches"
            )
        return self


class Parallel(Section):
    mode: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="the student on many ranks: replicated, or with weights, gradients and optimizer sharded (FSDP2)",
    )
    shard: PositiveInt | None = Field(
        None,
        description="fsdp: over how many consecutive ranks; those beyond hold the same (HSDP). Default: a node's",
    )
    timeout_minutes: PositiveFloat = Field(
        10.0, description="a rank that is stuck for so long ends the run, which says which rank it was and where"
    )


class Log(Section):
    every: PositiveInt = 20
    preview_every: NonNegativeInt = Field(1000, description="steps between image sheets; 0: none, and no VAE is loaded")
    preview_prompts: list[str] = Field(default_factory=list, description="default: eight spread over the prompt file")


class Profile(Section):
    steps: list[NonNegativeInt] = Field(
        default_factory=list, description="steps to record, for TensorBoard's profiler plugin, in `out`/profile"
    )


class Checkpoint(Section):
    every: PositiveInt = 1000
    asynchronous: bool = Field(
        True,
        description="written beside the training, from a copy in host memory: of the whole state on one rank, with fsdp"
        " of each rank's share",
    )
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
