"""Throughput and latency from a clock that moves as the test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny import PROMPTS, tiny_config
from torch import Tensor, nn

from tbcm.evaluation import speed as module


class Clock:
    """A first call of each kind costs a hundred times as much, as compilation does."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, set[Any]()

    def work(self, kind: Any, seconds: float) -> None:
        self.now += seconds if kind in self.seen else 100 * seconds
        self.seen.add(kind)


def test_speed_divides_images_by_medians(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes 0.5 s and 0.25 s an image, decoding 1 s an image, text 0.125 s a prompt."""
    clock = Clock()

    def sample(condition: int, noise: Any, steps: int, guidance: float) -> Tensor:
        assert noise().shape == (condition, 4, 8, 8) and (steps, guidance) == (2, 4.5)
        clock.work(("sample", condition), 0.5 + 0.25 * condition)
        return noise()

    def text(prompts: list[str]) -> int:
        clock.work(("text", len(prompts)), 0.125 * len(prompts))
        return len(prompts)

    def decode(vae: object, latents: Tensor, compression: int) -> Any:
        clock.work(("decode", len(latents)), 1.0 * len(latents))
        yield latents

    pipeline = SimpleNamespace(load_vae=lambda dtype: nn.Identity(), compression=8)
    sampler: Any = SimpleNamespace(
        net=nn.Linear(1, 1), text=text, sample=sample, shape=(4, 8, 8), pipeline=pipeline, config=tiny_config(tmp_path)
    )
    monkeypatch.setattr(module, "decode_in_parts", decode)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    found = module.speed(sampler, PROMPTS[:3], steps=2, guidance=4.5, batch=6)
    assert found == pytest.approx(
        {
            "throughput": 6 / 2.0,
            "throughput_decoded": 6 / 8.0,
            "latency": 0.75,
            "latency_decoded": 1.75,
            "text_throughput": 8.0,
            "text_latency": 0.125,
        }
    )
