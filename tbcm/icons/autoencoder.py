"""The icons autoencoder: a small diffusers AutoencoderDC, 64 px RGB <-> 8 channels of 8 x 8.

    python -m tbcm.icons.autoencoder DATA OUT [--steps N] [--minutes M] [--cooldown-steps N] [--device cuda]

DATA is what `tbcm.icons.dataset` wrote; OUT becomes a diffusers folder whose latents have standard deviation 1 and
mean about 0 in every channel, so `scaling_factor` is 1.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from tbcm.config.paths import path_argument
from tbcm.data.decoding import to_unit
from tbcm.errors import command
from tbcm.icons.colours import compose, random_colours
from tbcm.icons.dataset import load_drawings, load_shapes
from tbcm.icons.training import Budget, Rate, Training, WeightAverage, add_training_arguments, budget_of
from tbcm.runtime.files import atomic_folder

LATENT_CHANNELS = 8
BATCH = 8
PEAK_LR = 1e-3
EMA_DECAY = 0.998
CENTRING = 0.02  # weight of the term that keeps the latents' mean at zero


def make_autoencoder() -> AutoencoderDC:
    """1.5 M parameters, 8 times smaller both ways. Without layers in the first block nothing runs at full resolution
    but one convolution to and from 3 channels: that is what makes it cheap on a CPU."""
    channels, scales = (32, 32, 64, 128), ((), (), (), ())
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 2),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_out_shortcut=False,  # so that the end convolutions alone see the latents: see fold_scale
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the image gradients (an icon is little else than edges), of [B, 3, H, W] in [-1, 1]."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def off_centre(latents: Tensor) -> Tensor:
    """Mean over channels of (mean/std)^2. The scale of the latents can be folded into the weights afterwards, a mean
    cannot: the decoder's first convolution pads with zeros, so shifting its input changes the border."""
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    return (mean / std).square().mean()


@torch.no_grad()
def encode(vae: AutoencoderDC, images: Tensor, batch: int = 256) -> Tensor:
    """uint8 [n, 3, H, W] -> scaled latents [n, 8, H/8, W/8] float32 on the CPU."""
    device, dtype = vae.device, vae.dtype
    parts = [vae.encode(to_unit(part.to(device)).to(dtype)).latent.float().cpu() for part in images.split(batch)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderDC, latents: Tensor, batch: int = 256) -> Tensor:
    """Scaled latents [n, 8, h, w] -> float32 [n, 3, 8h, 8w] in [-1, 1] on the CPU."""
    device, dtype, scale = vae.device, vae.dtype, vae.config.scaling_factor
    parts = [vae.decode((part / scale).to(device, dtype)).sample.float().cpu() for part in latents.split(batch)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(vae: AutoencoderDC, images: Tensor) -> float:
    """Mean over the images of 10 log10(2^2/MSE) of the reconstructions, in dB."""
    error = (decode(vae, encode(vae, images)) - to_unit(images)).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def fold_scale(vae: AutoencoderDC, std: Tensor) -> None:
    """Divides the latents by `std` [8] in the encoder's last convolution and multiplies them back in the decoder's
    first: the composition is unchanged."""
    std = std.to(vae.device, vae.dtype)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight.div_(std[:, None, None, None])
    last.bias.div_(std)
    first.weight.mul_(std[None, :, None, None])


def export(vae: AutoencoderDC, images: Tensor, out: Path) -> None:
    """Saves a copy of `vae` with standardised latents as a diffusers folder; `images` tell their scale (64 positions
    each, so 500 give it within 1 %)."""
    std = encode(vae, images).std(dim=(0, 2, 3))
    folded: AutoencoderDC = copy.deepcopy(vae)
    fold_scale(folded, std)
    with atomic_folder(out) as part:
        folded.save_pretrained(part)


def masks_to_train_on(data: Path) -> tuple[Tensor, Tensor]:
    """Masks [n, 64, 64] uint8 to train on, and those of the unseen sets."""
    drawings = load_drawings(data)
    return torch.cat([drawings.select(unseen=False).masks, load_shapes(data)]), drawings.select(unseen=True).masks


def coloured(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 64, 64] in random colours, half of them mirrored: uint8 [B, 3, 64, 64]."""
    mirrored = torch.rand(len(masks), 1, 1, generator=generator) < 0.5
    return compose(torch.where(mirrored, masks.flip(2), masks), random_colours(len(masks), generator))


def train(data: Path, out: Path, budget: Budget, device: str) -> None:
    """The whole recipe; `out` is written anew every few minutes, with the average of the weights, and the state to go
    on from is kept beside it in `OUT.ckpt`."""
    masks, unseen = masks_to_train_on(data)
    fixed = torch.Generator().manual_seed(1)
    sample = coloured(masks[torch.randperm(len(masks), generator=fixed)[:500]], fixed)
    held_out = coloured(unseen[torch.randperm(len(unseen), generator=fixed)[:150]], fixed)
    torch.manual_seed(0)
    vae = make_autoencoder().to(device, memory_format=torch.channels_last).train()
    average = WeightAverage(vae, make_autoencoder().to(device, memory_format=torch.channels_last), EMA_DECAY)
    generator = torch.Generator().manual_seed(0)
    checkpoint = out.with_name(f"{out.name}.ckpt")
    training = Training(
        average, Rate(PEAK_LR * budget.rate), weight_decay=1e-4, generator=generator, checkpoint=checkpoint
    )

    def loss() -> Tensor:
        chosen = masks[torch.randint(len(masks), (BATCH,), generator=generator)]
        batch = to_unit(coloured(chosen, generator).to(device)).contiguous(memory_format=torch.channels_last)
        latents = vae.encoder(batch)
        return reconstruction_loss(vae.decoder(latents), batch) + CENTRING * off_centre(latents)

    def save(step: int) -> None:
        export(average.average, sample, out)
        print(f"{step} steps, PSNR on unseen sets {psnr(average.average, held_out):.2f} dB -> {out}", flush=True)

    training.fit(loss, save, budget)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tbcm.icons.autoencoder", description="Train the autoencoder.")
    parser.add_argument("data", type=path_argument, help="what tbcm.icons.dataset wrote")
    parser.add_argument("out", type=path_argument, help="becomes a diffusers folder")
    add_training_arguments(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    train(arguments.data, arguments.out, budget_of(arguments), arguments.device)


if __name__ == "__main__":
    sys.exit(main())
