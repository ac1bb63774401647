from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from tbcm.icons import captions, groups
from tbcm.icons.captions import Prompt
from tbcm.icons.colours import PAIRS
from tbcm.icons.dataset import Drawing
from tbcm.icons.groups import MISSING, Sampler, captions_of, mean_latent


def entries(*groups: tuple[str, str, int]) -> list[Drawing]:
    return [Drawing("set", f"{style}-{i}", concept, style) for concept, style, count in groups for i in range(count)]


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Hearts, 2 solid and 3 outlined, and outlined keys; red hearts are held out."""
    monkeypatch.setattr(captions, "colour_is_held_out", lambda concept, fg: (concept, fg) == ("heart", "red"))
    monkeypatch.setattr(captions, "held_out_style", lambda concept: None)
    return Sampler(entries(("heart", "solid", 2), ("heart", "outline", 3), ("key", "outline", 1)))


@pytest.mark.parametrize("s", [0.02, 0.3, 0.9, 1.0])
def test_the_mean_is_that_of_bayes_rule(s: float) -> None:
    """Against the densities themselves, one by one in fp64: p(c_k | x) = p_k N(x; (1 - s) c_k, s^2)/sum."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, generator=g, dtype=torch.float64)
    prior = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.1], dtype=torch.float64)
    x = (1 - s) * latents[2] + s * torch.randn(4, generator=g, dtype=torch.float64)
    likelihood = []
    for k in range(6):
        density = 1.0
        for d in range(4):
            density *= math.exp(-((x[d] - (1 - s) * latents[k, d]) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))
        likelihood.append(prior[k].item() * density)
    expected = sum(w * c for w, c in zip(likelihood, latents, strict=True)) / sum(likelihood)
    time = torch.tensor(s, dtype=torch.float64)
    torch.testing.assert_close(mean_latent(x, time, latents, prior.log()), expected, rtol=1e-9, atol=1e-12)
    fp32 = mean_latent(x.float(), time.float(), latents.float(), prior.log().float())
    torch.testing.assert_close(fp32.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_exact_target_is_the_mean_of_the_plain_one() -> None:
    """Among many (xbar_0, e), those whose x_s falls into a narrow bin have a mean e - xbar_0 of (x - mean)/s."""
    g = torch.Generator().manual_seed(0)
    latents, s = torch.tensor([[-1.0], [0.5], [2.0]]), 0.6
    prior = torch.tensor([0.5, 0.2, 0.3])
    k = torch.multinomial(prior, 2_000_000, replacement=True, generator=g)
    x0, e = latents[k, 0], torch.randn(len(k), generator=g)
    x = (1 - s) * x0 + s * e
    for at in (-0.7, 0.0, 0.9):
        near = (x - at).abs() < 0.01
        mean = mean_latent(torch.tensor([at]), torch.tensor(s), latents, prior.log())
        plain = (e - x0)[near]
        assert ((at - mean) / s).item() == pytest.approx(
            plain.mean().item(), abs=5 * plain.std().item() / len(plain) ** 0.5
        )


def test_a_group_is_what_the_caption_allows(sampler: Sampler) -> None:
    def rows(prompt: Prompt) -> set[tuple[int, str, str]]:
        group = sampler.group(prompt)
        assert group is not None and len(group.rows) == len(group.log_prior) == len(set(group.rows.tolist()))
        return {(row // len(PAIRS), *PAIRS[row % len(PAIRS)]) for row in group.rows.tolist()}

    assert rows(Prompt("heart", "solid", "blue", "white")) == {(0, "blue", "white"), (1, "blue", "white")}
    assert rows(Prompt("heart", None, "blue", "white")) == {(i, "blue", "white") for i in range(5)}
    free = rows(Prompt("heart", "outline", None, "white"))
    assert {i for i, _, _ in free} == {2, 3, 4} and len(free) == 3 * 7  # of eight colours red is held out
    assert rows(Prompt("key", "outline", "red", None)) == {(5, "red", bg) for _, bg in PAIRS[:4]}


def test_too_large_a_group_has_no_exact_mean(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST", 3)
    assert sampler.group(Prompt("heart", None, "blue", "white")) is None
    assert sampler.group(Prompt("heart", "outline", "blue", "white")) is not None


def test_draws_have_the_frequencies_that_the_prior_says(sampler: Sampler) -> None:
    """Of the draws with one prompt, each row's share is its prior's; and none is held out."""
    rng, seen = random.Random(0), Counter[tuple[int, Prompt]]()
    for _ in range(60_000):
        row, prompt = sampler.draw(rng)
        assert prompt.concept == "key" or PAIRS[row % len(PAIRS)][0] != "red"
        seen[row, prompt] += 1
    prompt = Prompt("heart", None, "blue", "white")  # 2 solid and 3 outlined drawings: 1/4 and 1/6 each
    group = sampler.group(prompt)
    assert group is not None
    total = sum(seen[row, prompt] for row in group.rows.tolist())
    assert total == sum(count for (_, other), count in seen.items() if other == prompt) > 50
    share = torch.softmax(group.log_prior, 0)
    assert share.tolist() == pytest.approx([1 / 4] * 2 + [1 / 6] * 3)
    for row, expected in zip(group.rows.tolist(), share.tolist(), strict=True):
        assert seen[row, prompt] / total == pytest.approx(expected, abs=5 * (0.25 / total) ** 0.5)
    full = sum(count for (_, other), count in seen.items() if None not in vars(other).values())
    assert full / 60_000 == pytest.approx(MISSING[()], abs=0.01)


def test_every_drawn_prompt_is_listed_and_has_captions(sampler: Sampler) -> None:
    prompts = sampler.prompts()
    wording = captions_of(prompts)
    rng = random.Random(1)
    assert {sampler.draw(rng)[1] for _ in range(2000)} <= set(prompts)
    assert wording[Prompt("heart", "solid", "blue", "white")][0] == "solid blue heart on white"
    assert all(1 <= len(set(some)) <= 2 for some in wording.values())
    assert len(prompts) == len(set(prompts))
