"""The emoji teacher: a small diffusers SanaTransformer2DModel trained by flow matching on cached latents and text.

    python -m tbcm.emoji.teacher DATA AE OUT [--minutes M | --steps N] [--device cuda]

DATA is what `tbcm.emoji.dataset` wrote, AE what `tbcm.emoji.autoencoder` wrote; OUT becomes the asset folder (see
`tbcm.emoji.assets`) plus `preview.png`, samples of captions seen in training (upper half) and held out (lower half).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from tbcm.emoji.autoencoder import LATENT_CHANNELS, encode
from tbcm.emoji.bundle import write_data_assets, write_teacher
from tbcm.emoji.dataset import EmojiImages, load_images
from tbcm.emoji.sampler import preview
from tbcm.emoji.training import Budget, WeightAverage, add_budget_arguments, learning_rate, shuffled_batches
from tbcm.errors import UserError
from tbcm.models.text import MiniLMEncoder, encode_null

MAX_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 128
PEAK_LR = 1.2e-3
WARMUP = 100
EMA_DECAY = 0.999


def make_transformer() -> SanaTransformer2DModel:
    """5.3 M parameters, 4 x 4 tokens of 2 x 2 latent pixels. `timestep_scale` 0.001 is for schedulers whose times run to
    1000: the network itself takes the flow-matching time s in [0, 1]."""
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


@dataclass(frozen=True)
class Cache:
    """What n images come down to: latents [n, 8, 8, 8], text states [n, L, 384] (fp32) and their mask [n, L] (bool)."""

    latents: Tensor
    embeds: Tensor
    mask: Tensor

    def __getitem__(self, index: Tensor) -> Cache:
        return Cache(self.latents[index], self.embeds[index], self.mask[index])

    def to(self, device: str) -> Cache:
        return Cache(self.latents.to(device), self.embeds.to(device), self.mask.to(device))


def make_cache(data: EmojiImages, vae: AutoencoderDC, text: MiniLMEncoder) -> Cache:
    captions = [entry.caption for entry in data.entries]
    encoded = [text.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    embeds, mask = (torch.cat(parts).cpu() for parts in zip(*encoded, strict=True))
    return Cache(encode(vae, data.images), embeds, mask)


def drop_captions(embeds: Tensor, mask: Tensor, null: tuple[Tensor, Tensor], drop: Tensor) -> tuple[Tensor, Tensor]:
    """Where `drop` [B] bool, states [B, L, D] *and* mask [B, L] become those of the null prompt ([1, L, D], [1, L]), so
    that guidance has to use the null prompt's own mask (`null_mask: own`)."""
    return torch.where(drop[:, None, None], null[0], embeds), torch.where(drop[:, None], null[1], mask)


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
    s = torch.rand(len(cache.latents), generator=generator).to(cache.latents.device)
    noise = torch.randn(cache.latents.shape, generator=generator).to(cache.latents.device)
    return float(flow_loss(model, cache, s, noise))


def half_precision(device: str) -> torch.autocast:
    """bf16 where the processor computes it natively, else fp32."""
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=native)


def train(data: Path, autoencoder: Path, out: Path, budget: Budget, device: str, save_minutes: float = 5.0) -> None:
    images = load_images(data)
    if not (autoencoder / "config.json").is_file():
        raise UserError(f"{autoencoder} is no autoencoder; make it with `python -m tbcm.emoji.autoencoder`")
    vae = AutoencoderDC.from_pretrained(autoencoder, torch_dtype=torch.float32).to(device)
    text = MiniLMEncoder(MAX_TOKENS, device=device)
    write_data_assets(images, out)
    cache = make_cache(images.split(held_out=False), vae, text).to(device)
    unseen = make_cache(images.split(held_out=True), vae, text).to(device)
    null = encode_null(text)
    torch.manual_seed(0)
    model = make_transformer().to(device).train()
    average = WeightAverage(model, make_transformer().to(device), EMA_DECAY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = shuffled_batches(len(cache.latents), BATCH, generator)

    def save(step: int) -> None:
        write_teacher(average.average, vae, out)
        preview(average.average, vae, cache, unseen, null, out / "preview.png")
        loss = validation_loss(average.average, unseen)
        print(f"saved {out} after {step} steps, held-out loss {loss:.4f}", flush=True)

    budget.restart()
    step, saved, running = 0, 0.0, 0.0
    while (progress := budget.progress(step)) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(PEAK_LR, step, progress, WARMUP)
        batch = cache[next(batches)]
        count = len(batch.latents)
        drop = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        batch = Cache(batch.latents, *drop_captions(batch.embeds, batch.mask, null, drop.to(device)))
        s = sample_times(count, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        with half_precision(device):
            loss = flow_loss(model, batch, s, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step} minutes {budget.elapsed_minutes():.1f} loss {running:.4f}", flush=True)
        if budget.elapsed_minutes() - saved >= save_minutes:
            save(step)
            saved = budget.elapsed_minutes()
    save(step)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tbcm.emoji.teacher", description="Train the emoji teacher.")
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_budget_arguments(parser, default_minutes=55)
    args = parser.parse_args(argv)
    minutes = args.minutes if args.steps is not None or args.minutes is not None else 55.0
    try:
        train(args.data, args.autoencoder, args.out, Budget(minutes, args.steps), args.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
