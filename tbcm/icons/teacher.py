"""The icons teacher: a small diffusers SanaTransformer2DModel trained by flow matching on cached latents and text.

    python -m tbcm.icons.teacher WORK OUT [--steps N] [--minutes M] [--cooldown-steps N] [--resume-from ASSETS]

WORK holds what `tbcm.icons.dataset` wrote and, in `autoencoder/`, what `tbcm.icons.autoencoder` wrote; latents, text
states and the state to go on from are kept there. OUT becomes the asset folder (see `tbcm.icons.bundle`), and
`OUT-preview.png` shows samples. With `--resume-from` a training on another machine goes on: drawings, weights and
autoencoder come from that asset folder, the optimizer begins anew, and the samples seen are counted on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.icons.autoencoder import LATENT_CHANNELS
from tbcm.icons.bundle import write_data_assets, write_teacher
from tbcm.icons.caches import TextStates, make_latents, make_text
from tbcm.icons.dataset import load_drawings
from tbcm.icons.groups import Sampler, captions_of, mean_latent
from tbcm.icons.sampler import preview
from tbcm.icons.training import Budget, Rate, Training, WeightAverage, add_training_arguments, budget_of
from tbcm.models.text import MiniLMEncoder, encode_null
from tbcm.runtime.files import write_json

MAX_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 64
PEAK_LR = 1e-3
WARMUP = 200
EMA_DECAY = 0.9995

PREVIEW = (
    "solid red heart on white",
    "outline blue camera on yellow",
    "solid purple rocket on white",
    "solid green leaf on light blue",
    "outline orange umbrella on white",
    "solid black bug on yellow",
    "solid brown car on gray",
    "outline pink key on white",
    "solid blue moon on yellow",
    "solid orange fire on white",
    "outline green tree on yellow",
    "solid red trophy on white",
    "solid purple ghost on light blue",
    "outline black brain on gray",
    "solid pink flower on white",
    "solid blue fish on yellow",
)


PREVIEW_ROWS = 5


def make_transformer() -> SanaTransformer2DModel:
    """5.9 M parameters, 4 x 4 tokens of 2 x 2 latent pixels. `timestep_scale` 0.001 is for schedulers whose times run
    to 1000: the network itself takes the flow-matching time s in [0, 1]."""
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=8,
        attention_head_dim=32,
        num_layers=5,
        num_cross_attention_heads=4,
        cross_attention_head_dim=64,
        cross_attention_dim=256,
        caption_channels=384,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1.0,  # with sine-cosine positions: on a 4 x 4 grid padding alone is slow to learn from
        qk_norm="rms_norm_across_heads",
        guidance_embeds=False,
        timestep_scale=0.001,
    )


def sample_times(count: int, generator: torch.Generator) -> Tensor:
    """s = sigmoid(0.3 + 1.2 n) [count]: logit-normal (Esser et al. 2024), a little towards noise, where few tokens
    have to decide what the picture is."""
    return torch.sigmoid(0.3 + 1.2 * torch.randn(count, generator=generator))


@dataclass(frozen=True)
class Batch:
    """x_s [B, C, h, w], s [B], text states and the velocity to regress on [B, C, h, w]; all fp32."""

    x: Tensor
    s: Tensor
    text: TextStates
    target: Tensor

    def to(self, device: str) -> Batch:
        embeds, mask = self.text
        return Batch(self.x.to(device), self.s.to(device), (embeds.to(device), mask.to(device)), self.target.to(device))


class Batches:
    """Draws batches from latents [n, pairs, C, h, w] and the text states of `captions` [m, L, D] with their lengths."""

    def __init__(
        self, sampler: Sampler, latents: Tensor, captions: list[str], states: tuple[Tensor, Tensor], null: TextStates
    ) -> None:
        self.sampler, self.shape = sampler, latents.shape[2:]
        self.latents = latents.flatten(0, 1).flatten(1)  # [n * pairs, D]
        self.row_of = {caption: row for row, caption in enumerate(captions)}
        self.captions = captions_of(sampler.prompts())
        self.states, self.lengths, self.null = *states, null

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        drawn = [self.sampler.draw(rng) for _ in range(count)]
        x0 = self.latents[torch.tensor([row for row, _ in drawn])].float()
        noise = torch.randn(x0.shape, generator=generator)
        s = sample_times(count, generator)
        x = (1 - s[:, None]) * x0 + s[:, None] * noise
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        target = noise - x0
        for i, (_, prompt) in enumerate(drawn):
            group = None if dropped[i] else self.sampler.group(prompt)
            if group is not None:
                mean = mean_latent(x[i], s[i], self.latents[group.rows].float(), group.log_prior)
                target[i] = (x[i] - mean) / s[i]
        text = self._text([rng.choice(self.captions[prompt]) for _, prompt in drawn], dropped)
        return Batch(x.unflatten(1, self.shape), s, text, target.unflatten(1, self.shape))

    def _text(self, captions: list[str], dropped: Tensor) -> TextStates:
        """Where `dropped`, states *and* mask are those of the null prompt, so that guidance has to use the null
        prompt's own mask (`null_mask: own`)."""
        rows = torch.tensor([self.row_of[caption] for caption in captions])
        embeds, mask = self.states[rows].float(), torch.arange(self.states.shape[1]) < self.lengths[rows, None]
        return torch.where(dropped[:, None, None], self.null[0], embeds), torch.where(
            dropped[:, None], self.null[1], mask
        )


def flow_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean square of v(x_s, s) - target."""
    embeds, mask = batch.text
    velocity = model(batch.x, embeds, batch.s, encoder_attention_mask=mask, return_dict=False)[0]
    return (velocity.float() - batch.target).square().mean()


def computes_bf16(device: str) -> bool:
    """Whether the processor has instructions of its own for it."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


def half_precision(device: str) -> torch.autocast:
    """bf16 where the processor computes it natively, else fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=computes_bf16(device))


def load_autoencoder(folder: Path) -> AutoencoderDC:
    """As it is shipped: rounded to fp16, so that the latents are the same wherever the training goes on."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no autoencoder; make it with `python -m tbcm.icons.autoencoder DATA {folder}`")
    vae: AutoencoderDC = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float16)
    return vae.float().eval()


def load_transformer(folder: Path) -> SanaTransformer2DModel:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no teacher to go on from")
    model: SanaTransformer2DModel = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    return model


def read_curve(assets: Path | None) -> list[dict[str, float]]:
    """The learning curve in an asset folder: rows of samples seen and loss, oldest first; none where there is none."""
    file = None if assets is None else assets / "training.json"
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))["curve"]
    return rows


def samples_before(assets: Path | None) -> int:
    """How many samples the teacher in an asset folder has seen."""
    return int(max((row["samples"] for row in read_curve(assets)), default=0))


def write_curve(out: Path, before: list[dict[str, float]], samples: int, loss: float) -> None:
    """Writes training.json: `before`, up to where this row goes on, and the row."""
    curve = [row for row in before if row["samples"] < samples]
    write_json(out / "training.json", {"curve": [*curve, {"samples": samples, "loss": loss}]})


def train(work: Path, out: Path, budget: Budget, device: str, resume_from: Path | None = None) -> None:
    """The whole recipe; `out` is written anew every few minutes, with the average of the weights."""
    if resume_from is not None and out.resolve() == resume_from.resolve():
        raise UserError(f"{out} is what the training goes on from: choose another folder to write to")
    everything = load_drawings(resume_from or work)
    drawings = everything.select(unseen=False)
    vae = load_autoencoder((resume_from / "teacher" / "vae") if resume_from else work / "autoencoder")
    text = MiniLMEncoder(MAX_TOKENS, device=device)
    sampler = Sampler(drawings.entries)
    captions = sorted({caption for some in captions_of(sampler.prompts()).values() for caption in some})
    null = encode_null(text)
    null = (null[0].cpu(), null[1].cpu())
    batches = Batches(sampler, make_latents(work, drawings, vae), captions, make_text(work, captions, text), null)
    shown = text.encode(list(PREVIEW))
    torch.manual_seed(0)
    model = load_transformer(resume_from / "teacher" / "transformer") if resume_from else make_transformer()
    model = model.to(device, memory_format=torch.channels_last).train()  # 15 % faster on a CPU
    average = WeightAverage(model, make_transformer().to(device, memory_format=torch.channels_last), EMA_DECAY)
    generator = torch.Generator().manual_seed(samples_before(resume_from))
    training = Training(
        average,
        Rate(PEAK_LR * budget.rate, WARMUP),
        weight_decay=0.01,
        generator=generator,
        checkpoint=work / "teacher.ckpt",
    )
    write_data_assets(everything, out)

    def loss() -> Tensor:
        with half_precision(device):
            return flow_loss(model, batches.draw(BATCH, generator).to(device))

    def save(step: int) -> None:
        samples = samples_before(resume_from) + step * BATCH
        write_teacher(average.average, vae, out)
        write_curve(out, read_curve(out) or read_curve(resume_from), samples, training.recent_loss)
        sheet = out.with_name(f"{out.name}-preview.png")
        preview(
            average.average, vae, shown, (null[0].to(device), null[1].to(device)), list(PREVIEW), PREVIEW_ROWS, sheet
        )
        print(f"{step} steps, {samples} samples -> {out}", flush=True)

    training.fit(loss, save, budget)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tbcm.icons.teacher", description="Train the icons teacher.")
    parser.add_argument(
        "work", type=path_argument, help="folder with the drawings and, in autoencoder/, the autoencoder"
    )
    parser.add_argument("out", type=path_argument, help="the asset folder")
    parser.add_argument("--resume-from", type=path_argument, help="asset folder of a training that goes on here")
    add_training_arguments(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    train(arguments.work, arguments.out, budget_of(arguments), arguments.device, arguments.resume_from)


if __name__ == "__main__":
    sys.exit(main())
