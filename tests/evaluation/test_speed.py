"""Throughput and latency from a clock that moves as the test says."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import PROMPTS, tiny_config
from torch import Tensor, nn

from tbcm.config.resolution import Size
from tbcm.evaluation import speed as module


class Clock:
    """A first call of each kind costs a hundred times as much, as compilation does."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, Counter[Any]()

    def work(self, kind: Any, seconds: float) -> None:
        self.calls[kind] += 1
        self.now += seconds if self.calls[kind] > 1 else 100 * seconds


def test_speed_divides_images_by_medians(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes 0.5 s and 0.25 s an image, decoding 1 s an image, text 0.125 s a prompt, give or take 20 %."""
    clock = Clock()

    def sample(condition: int, noise: Any, steps: int, guidance: float) -> Tensor:
        assert noise().shape == (condition, 4, 8, 8) and (steps, guidance) == (2, 4.5)
        clock.work(("sample", condition), 0.5 + 0.25 * condition)
        return noise()

    def text(prompts: list[str], size: Size) -> int:
        scatter = 0.8 + 0.1 * (clock.calls["text", len(prompts)] % 5)
        clock.work(("text", len(prompts)), 0.125 * len(prompts) * scatter)
        return len(prompts)

    def decode(pipeline: object, vae: object, latents: Tensor) -> Any:
        clock.work(("decode", len(latents)), 1.0 * len(latents))
        yield latents

    pipeline = SimpleNamespace(load_vae=lambda dtype: nn.Identity(), compression=8)
    sampler: Any = SimpleNamespace(
        net=nn.Linear(1, 1),
        text=text,
        sample=sample,
        shape=(4, 8, 8),
        size=(64, 64),
        pipeline=pipeline,
        config=tiny_config(tmp_path),
    )
    monkeypatch.setattr(module, "decode_in_parts", decode)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    found = module.speed(sampler, PROMPTS[:3], steps=2, guidance=4.5, batch=6)
    medians = {
        "throughput": 6 / 2.0,
        "throughput_decoded": 6 / 8.0,
        "latency": 0.75,
        "latency_decoded": 1.75,
        "text_throughput": 8.0,
        "text_latency": 0.125,
    }
    assert {name: found[name] for name in medians} == pytest.approx(medians)
    assert found.keys() == {f"{name}{end}" for name in medians for end in ("", "_p20", "_p80")}
    assert found["latency_p20"] == found["latency_p80"] == pytest.approx(0.75)
    times = [0.125 * (0.8 + 0.1 * k) for k in range(5)] * 2  # of the ten calls that are timed
    for name, values in (("text_latency", times), ("text_throughput", [1 / time for time in times])):
        assert [found[f"{name}_p20"], found[f"{name}_p80"]] == pytest.approx(np.percentile(values, [20, 80]))
