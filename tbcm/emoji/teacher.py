"""The emoji teacher: a small diffusers SanaTransformer2DModel trained by flow matching on cached latents and text.

    python -m tbcm.emoji.teacher DATA AE OUT [--minutes M | --steps N] [--device cuda]

DATA is what `tbcm.emoji.dataset` wrote, AE what `tbcm.emoji.autoencoder` wrote; OUT becomes the asset folder (see
`tbcm.emoji.bundle`). `OUT-preview.png` beside it shows samples of captions seen in training and of held-out ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from tbcm.emoji.autoencoder import LATENT_CHANNELS
from tbcm.emoji.bundle import write_data_assets, write_teacher
from tbcm.emoji.cache import Cache, drop_captions, make_cache
from tbcm.emoji.dataset import load_images
from tbcm.emoji.sampler import preview
from tbcm.emoji.training import Budget, WeightAverage, add_training_arguments, budget_of, fit, shuffled_batches
from tbcm.errors import UserError, command
from tbcm.models.text import MiniLMEncoder, encode_null
from tbcm.paths import path_argument

MAX_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 128
PEAK_LR = 1.2e-3
EMA_DECAY = 0.999


def make_transformer() -> SanaTransformer2DModel:
    """5.3 M parameters, 4 x 4 tokens of 2 x 2 latent pixels. `timestep_scale` 0.001 is for schedulers whose times run
    to 1000: the network itself takes the flow-matching time s in [0, 1]."""
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=7,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=4,
        cross_attention_head_dim=56,
        cross_attention_dim=224,
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


def flow_loss(model: nn.Module, batch: Cache, s: Tensor, noise: Tensor) -> Tensor:
    """Mean square of v(x_s, s) - (e - xbar_0) at x_s = (1 - s) xbar_0 + s e; s [B], noise e [B, C, H, W]."""
    share = s[:, None, None, None]
    x = (1 - share) * batch.latents + share * noise
    velocity = model(x, batch.embeds, s, encoder_attention_mask=batch.mask, return_dict=False)[0]
    return (velocity.float() - (noise - batch.latents)).square().mean()


@torch.no_grad()
def validation_loss(model: nn.Module, cache: Cache) -> float:
    """The loss on all of `cache` at the same times and noise in every call."""
    generator = torch.Generator().manual_seed(1)
    s = torch.rand(len(cache), generator=generator).to(cache.latents.device)
    noise = torch.randn(cache.latents.shape, generator=generator).to(cache.latents.device)
    return float(flow_loss(model, cache, s, noise))


def half_precision(device: str) -> torch.autocast:
    """bf16 where the processor computes it natively, else fp32."""
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=native)


def load_autoencoder(folder: Path, device: str) -> AutoencoderDC:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no autoencoder; make it with `python -m tbcm.emoji.autoencoder DATA {folder}`")
    vae: AutoencoderDC = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32)
    return vae.to(device).eval()


def train(data: Path, autoencoder: Path, out: Path, budget: Budget, device: str) -> None:
    """The whole recipe; `out` is written anew every few minutes, with the average of the weights."""
    images = load_images(data)
    vae = load_autoencoder(autoencoder, device)
    text = MiniLMEncoder(MAX_TOKENS, device=device)
    write_data_assets(images, out)
    seen, unseen = (make_cache(images.split(held_out), vae, text).to(device) for held_out in (False, True))
    null = encode_null(text)
    torch.manual_seed(0)
    model = make_transformer().to(device).train()
    average = WeightAverage(model, make_transformer().to(device), EMA_DECAY)
    generator = torch.Generator().manual_seed(0)
    batches = shuffled_batches(len(seen), BATCH, generator)

    def loss(step: int) -> Tensor:
        batch = seen[next(batches)]
        drop = torch.rand(len(batch), generator=generator) < CAPTION_DROPOUT
        batch = Cache(batch.latents, *drop_captions((batch.embeds, batch.mask), null, drop.to(device)))
        s = sample_times(len(batch), generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        with half_precision(device):
            return flow_loss(model, batch, s, noise)

    def save(step: int) -> None:
        write_teacher(average.average, vae, out)
        preview(average.average, vae, seen, unseen, null, out.parent / f"{out.name}-preview.png")
        held_out = validation_loss(average.average, unseen)
        print(f"{step} steps, held-out loss {held_out:.4f} -> {out}", flush=True)

    fit(average, loss, save, budget, peak_lr=PEAK_LR, weight_decay=0.01)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tbcm.emoji.teacher", description="Train the emoji teacher.")
    parser.add_argument("data", type=path_argument, help="what tbcm.emoji.dataset wrote")
    parser.add_argument("autoencoder", type=path_argument, help="what tbcm.emoji.autoencoder wrote")
    parser.add_argument("out", type=path_argument, help="the asset folder")
    add_training_arguments(parser, minutes=55)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    train(arguments.data, arguments.autoencoder, arguments.out, budget_of(arguments), arguments.device)


if __name__ == "__main__":
    sys.exit(main())
