"""Throughput and latency of a sampler, as the paper's Tab. 2 has them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from tbcm.inference.generation import Sampler, decode_in_parts
from tbcm.runtime.spread import spread
from tbcm.setup.precision import dtype_of, weights_dtype

WARM_UP, REPEATS = 2, 10


def speed(sampler: Sampler, prompts: Sequence[str], *, steps: int, guidance: float, batch: int) -> dict[str, float]:
    """Medians of 10 after 2 to warm up, the device waited for, each NAME with NAME_p20 and NAME_p80, its 20 % and 80 %
    quantiles:

    throughput, throughput_decoded: images/s at `batch`, without and with decoding latents to pixels.
    latency, latency_decoded: seconds for a single image, likewise.
    text_throughput, text_latency: the text encoder alone, prompts/s at `batch` and seconds for a single one.

    The text encoder is in none of the first four, the noise is on the device before the clock starts, and images stay
    on it. The VAE's weights are kept as the teacher's would be.
    """
    device = next(sampler.net.parameters()).device
    precision = weights_dtype(dtype_of(sampler.config.teacher.precision, device))
    vae = sampler.pipeline.load_vae(precision).to(device)
    one, many = (_Timed(sampler, vae, prompts[:size], steps, guidance, size) for size in (1, batch))
    found = {
        "throughput": many.rates(many.sample),
        "throughput_decoded": many.rates(many.sample_and_decode),
        "latency": one.seconds(one.sample),
        "latency_decoded": one.seconds(one.sample_and_decode),
        "text_throughput": many.rates(many.encode),
        "text_latency": one.seconds(one.encode),
    }
    return {key: value for name, values in found.items() for key, value in spread(values).named(name).items()}


class _Timed:
    """What is timed, on one batch of `size`."""

    def __init__(
        self, sampler: Sampler, vae: AutoencoderDC, prompts: Sequence[str], steps: int, guidance: float, size: int
    ) -> None:
        self.sampler, self.vae, self.steps, self.guidance = sampler, vae, steps, guidance
        self.device = next(sampler.net.parameters()).device
        self.prompts = list(itertools.islice(itertools.cycle(prompts), size))
        self.noise = torch.randn(size, *sampler.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.condition = sampler.text(self.prompts, sampler.size)

    def encode(self) -> object:
        return self.sampler.text(self.prompts, self.sampler.size)

    def sample(self) -> Tensor:
        return self.sampler.sample(self.condition, lambda: self.noise, self.steps, self.guidance)

    def sample_and_decode(self) -> list[Tensor]:
        return list(decode_in_parts(self.sampler.pipeline, self.vae, self.sample()))

    def rates(self, call: Callable[[], object]) -> list[float]:
        """Images or prompts a second."""
        return [len(self.prompts) / seconds for seconds in self.seconds(call)]

    def seconds(self, call: Callable[[], object]) -> list[float]:
        for _ in range(WARM_UP):
            call()
        return [self._once(call) for _ in range(REPEATS)]

    def _once(self, call: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
