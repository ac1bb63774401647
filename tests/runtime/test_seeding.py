from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tbcm.runtime.seeding import generator, seeded, stream_bytes

CPU = torch.device("cpu")


def draw(seed: int, step: int, stream: str, count: int = 1000) -> torch.Tensor:
    return torch.randn(count, generator=generator("cpu", seed, step, stream))


def test_streams_are_shake_256_of_their_parts() -> None:
    # printf '0/0/noise' | openssl dgst -shake256 -xoflen 8: fixed, or runs cannot be resumed by a later version
    assert stream_bytes(0, 0, "noise", 8).hex() == "7b1563d867c570eb"
    assert stream_bytes(7, 19999, "route", 8).hex() == "f1445275f289aa23"


def test_a_cpus_generator_is_mt19937_with_the_whole_hash_as_its_state() -> None:
    """NumPy's, given the same 624 words: its outputs are the ones that PyTorch's are made of."""
    words = np.frombuffer(hashlib.shake_256(b"5/6/route").digest(4 * 624), "<u4")
    numpys = np.random.MT19937()
    numpys.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    drawn = torch.empty(2000, dtype=torch.int64).random_(0, 2**20, generator=generator("cpu", 5, 6, "route"))
    expected = np.random.Generator(numpys).bit_generator.random_raw(2000).astype(np.int64)
    assert np.array_equal(drawn.numpy(), expected % 2**20)


def test_same_triple_same_numbers_and_each_part_matters() -> None:
    first = draw(1, 2, "noise")
    assert torch.equal(first, draw(1, 2, "noise"))
    for other in (draw(2, 2, "noise"), draw(1, 3, "noise"), draw(1, 2, "route"), draw(12, 2, "noise")):
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert correlation.abs() < 0.15  # standard error 0.03


def test_seeds_that_differ_in_their_high_bits_are_different_runs() -> None:
    draws = [draw(seed, 0, "noise") for seed in (5, 5 + 2**32, 5 + 2**62, 2**63 - 1, 2**31 - 1)]
    assert not any(torch.equal(a, b) for a, b in combinations(draws, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [((821, "filter"), (10_617, "filter")), ((5704, "adversarial noise"), (8861, "adversarial noise"))],
)
def test_streams_of_one_run_do_not_coincide(one: tuple[int, str], other: tuple[int, str]) -> None:
    """With 64-bit seeds, of which a CPU keeps the low 32 bits, these two did, and eight more of 240,000."""
    assert not torch.equal(draw(0, *one), draw(0, *other))


def test_no_two_streams_of_a_run_start_alike() -> None:
    names = ("noise", "route", "guidance", "filter", "time", "sample")
    assert len({stream_bytes(0, step, name, 16) for step in range(20_000) for name in names}) == 120_000


def test_the_default_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    torch.randn(5, generator=generator("cpu", 1, 2, "noise"))
    with seeded(CPU, 3, "layers"):
        torch.randn(5)
    assert torch.equal(torch.randn(3), expected)


def test_layers_made_for_a_purpose() -> None:
    def made(seed: int, stream: str) -> torch.Tensor:
        with seeded(CPU, seed, stream):
            return torch.nn.Linear(4, 3).weight.detach()

    assert torch.equal(made(3, "student"), made(3, "student"))
    for other in (made(3 + 2**32, "student"), made(3, "discriminator")):
        assert not torch.equal(made(3, "student"), other)


def test_a_step_that_is_only_traced_can_draw() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.randn(3, generator=generator("cpu", 0, 0, "noise")).shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_generator_takes_128_bits() -> None:
    first, other = (generator("cuda", seed, 2, "noise") for seed in (1, 1 + 2**32))
    assert first.initial_seed() != other.initial_seed() and first.get_offset() != other.get_offset()
    again = generator("cuda", 1, 2, "noise")
    assert torch.equal(torch.randn(9, generator=first, device="cuda"), torch.randn(9, generator=again, device="cuda"))
