"""Any number of ranks, replicated or sharded, makes the run that one rank makes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from ranks import on_ranks
from tiny import metrics, tiny_config, tiny_parts
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbcm.runtime import distributed
from tbcm.runtime.files import write_json
from tbcm.training.methods.adversary import FIGURES
from tbcm.training.preview import Previewer
from tbcm.training.trainer import Trainer

Sections = dict[str, dict[str, Any]]

# Few steps and a small rate of AdamW, which divides by the gradient's size: rounding must not grow.
BASE: Sections = {
    "train": {"steps": 3, "prompts_per_step": 4},
    "log": {"every": 1},
    "optimizer": {"lr": 1e-4},
}


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def train(runs: dict[Path, Sections]) -> None:
    """Each run's student and average, at its end."""
    for out, sections in runs.items():
        base = {name: BASE[name] | sections.get(name, {}) for name in BASE}
        config = tiny_config(out, **sections | base)
        trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
        trainer.run()
        sharded = config.parallel.mode == "fsdp"
        assert all(isinstance(weight, DTensor) == (sharded and weight.requires_grad) for weight in all_weights(trainer))
        weights = whole(trainer.student.state_dict()), whole(trainer.ema.shadow)
        if distributed.is_main():
            torch.save(weights, out / "weights.pt")


def all_weights(trainer: Trainer) -> list[Tensor]:
    return [*trainer.student.parameters(), *trainer.teacher.parameters()]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single")
    train({out: {}})
    return out


def assert_same_run(one: Path, other: Path, atol: float = 2e-6) -> None:
    for expected, got in zip(torch.load(one / "weights.pt"), torch.load(other / "weights.pt"), strict=True):
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=atol, msg=name)
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in a.keys() & {"loss", "error", "grad_norm", "kept", "g_norm"}:
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-6)


ACCUMULATED: Sections = {"train": {"prompts_per_rollout": 1, "points_per_micro_batch": 2}}
FSDP: Sections = {"parallel": {"mode": "fsdp"}}
HSDP: Sections = {"parallel": {"mode": "fsdp", "shard": 2}}
WAYS: dict[int, dict[str, Sections]] = {
    1: {"accumulated": ACCUMULATED},
    2: {
        "ddp": ACCUMULATED,
        "fsdp": FSDP | ACCUMULATED,
        "selective": FSDP | {"student": {"checkpointing": "selective"}},
        "jvp": FSDP | {"student": {"derivative": "jvp", "checkpointing": "full"}},
        "two_pass": FSDP | {"student": {"tangent": "two_pass"}, "text": {"once": False}},
    },
    4: {"ddp": {}, "hsdp": HSDP | {"student": {"checkpointing": "full"}}},
}


@pytest.mark.parametrize("ranks", WAYS)
def test_the_number_of_ranks_changes_nothing(ranks: int, single: Path, tmp_path: Path) -> None:
    on_ranks(ranks, train, {tmp_path / name: sections for name, sections in WAYS[ranks].items()})
    for name in WAYS[ranks]:
        assert_same_run(single, tmp_path / name)


SPRINT: Sections = {"method": {"name": "sprint", "adversary": {"lr": 1e-4}}}


def test_nor_with_an_adversary(tmp_path: Path) -> None:
    """Whose heads are replicated, and whose gradient comes before the one that is exchanged."""
    train({tmp_path / "single": SPRINT})
    ways = {"ddp": SPRINT | ACCUMULATED, "fsdp": SPRINT | FSDP}
    on_ranks(2, train, {tmp_path / name: sections for name, sections in ways.items()})
    for name in ways:
        assert_same_run(tmp_path / "single", tmp_path / name)
        for a, b in zip(metrics(tmp_path / "single"), metrics(tmp_path / name), strict=True):
            for key in FIGURES:
                torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)


PCM: Sections = {"method": {"name": "pcm", "phases": 2, "adversary": {"lr": 1e-4}}}


def test_nor_with_an_adversary_that_sees_points_of_trajectories(tmp_path: Path) -> None:
    """Whose draws are those of a prompt's place in the global batch and of the point."""
    train({tmp_path / "single": PCM})
    ways = {"ddp": PCM | ACCUMULATED, "fsdp": PCM | FSDP}
    on_ranks(2, train, {tmp_path / name: sections for name, sections in ways.items()})
    for name in ways:
        assert_same_run(tmp_path / "single", tmp_path / name)
        for a, b in zip(metrics(tmp_path / "single"), metrics(tmp_path / name), strict=True):
            for key in FIGURES:
                torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)


DMD2: Sections = {"method": {"name": "dmd2", "steps": 2, "fake": {"updates": 2, "lr": 1e-4}, "adversary": {"lr": 1e-4}}}


def test_nor_with_a_network_that_follows_the_student(tmp_path: Path) -> None:
    """Which is replicated or sharded as the student is, and updated several times a step."""
    train({tmp_path / "single": DMD2})
    ways = {
        "ddp": DMD2 | {"train": {"prompts_per_rollout": 1}},
        "fsdp": DMD2 | FSDP | {"train": {"prompts_per_rollout": 1}},
    }
    on_ranks(2, train, {tmp_path / name: sections for name, sections in ways.items()})
    for name in ways:
        assert_same_run(tmp_path / "single", tmp_path / name)
        for a, b in zip(metrics(tmp_path / "single"), metrics(tmp_path / name), strict=True):
            for key in (*FIGURES, "fake_loss"):
                torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)


LCM: Sections = {"method": {"name": "lcm", "target_decay": 0.5}}
LCM_OF_ITSELF: Sections = {"method": {"name": "lcm", "target_decay": 0}}


def test_nor_with_a_target_network(tmp_path: Path) -> None:
    """Which is an average of its own on each rank; or it is the student, called twice before its backward pass."""
    train({tmp_path / "single": LCM, tmp_path / "itself": LCM_OF_ITSELF})
    ways = {"ddp": LCM | ACCUMULATED, "ddp-itself": LCM_OF_ITSELF, "fsdp-itself": LCM_OF_ITSELF | FSDP | ACCUMULATED}
    on_ranks(2, train, {tmp_path / name: sections for name, sections in ways.items()})
    for name in ways:
        assert_same_run(tmp_path / ("itself" if name.endswith("itself") else "single"), tmp_path / name)


LORA: Sections = {"student": {"lora": {"rank": 2}}}


def test_nor_with_adapters_on_shared_weights(tmp_path: Path) -> None:
    """Of which frozen ones stay whole and the teacher's own; with an adversary too, which looks into the teacher."""
    train({tmp_path / "single": LORA, tmp_path / "single-sprint": LORA | SPRINT})
    full = {"student": {"lora": {"rank": 2}, "checkpointing": "full"}}
    ways = {"ddp": LORA | ACCUMULATED, "fsdp": full | FSDP | ACCUMULATED, "sprint": LORA | SPRINT | FSDP}
    on_ranks(2, train, {tmp_path / name: sections for name, sections in ways.items()})
    for name in ways:  # B starts at zero, where AdamW magnifies what rounding makes of a small gradient
        assert_same_run(tmp_path / ("single-sprint" if name == "sprint" else "single"), tmp_path / name, atol=1e-5)


class Collectives(TorchDispatchMode):
    """Names of the collectives that move more than a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d" and max(tensor.numel() for tensor in tensors_of(args)) > 1:
            self.names.append(operator._opname)
        return operator(*args, **(kwargs or {}))


def tensors_of(args: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def count_exchanges(out: Path) -> None:
    names = {}
    for mode in ("ddp", "fsdp"):
        config = tiny_config(
            out, parallel={"mode": mode}, train={"prompts_per_rollout": 1, "points_per_micro_batch": 2}
        )
        trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
        trainer.train_step()
        with Collectives() as collectives:
            trainer.train_step()
        names[mode] = collectives.names
    if distributed.is_main():
        write_json(out / "names.json", names)


def test_gradients_are_exchanged_once_a_step(tmp_path: Path) -> None:
    """Of a step of two rollouts with two micro-batches each; two blocks and the rest are sharded."""
    on_ranks(2, count_exchanges, tmp_path)
    names = json.loads((tmp_path / "names.json").read_text())
    assert names["ddp"].count("allreduce_") == 2  # gradients, and which of them were used
    gathers, scatters = (names["fsdp"].count(name) for name in ("_allgather_base_", "_reduce_scatter_base_"))
    assert (gathers, scatters, len(names["fsdp"])) == (4 * (2 * 2 + 1), 3, 4 * (2 * 2 + 1) + 3)


def preview_between(out: Path) -> None:
    """Two steps with and without a look at the average, which lies far from the weights."""
    weights = []
    for looks in (False, True):
        sections = {"parallel": {"mode": "fsdp"}, "optimizer": {"lr": 0.1}, "ema": {"kind": "halflife"}}
        config = tiny_config(out, **sections)
        trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
        trainer.train_step()
        if looks:
            sampler = Mock(latents=partial(asked, trainer))
            of = {"parts": trainer.parts, "wrapped": trainer.wrapped, "ema": trainer.ema}
            Previewer._latents(Mock(**of, student=sampler, prompts=["red cat"], steps=(1, 2)))
        trainer.train_step()
        weights.append(whole(trainer.student.state_dict()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def asked(trainer: Trainer, prompts: list[str], *, steps: int) -> Tensor:
    noise, condition = torch.randn(len(prompts), 4, 8, 8), trainer.text(prompts, (64, 64))
    with torch.no_grad():
        return trainer.student(noise, torch.ones(len(prompts)), condition, torch.ones(len(prompts))).F


def test_a_preview_of_a_sharded_student_changes_nothing(tmp_path: Path) -> None:
    on_ranks(2, preview_between, tmp_path)


def test_nor_with_images_of_several_sizes(tmp_path: Path) -> None:
    sizes: Any = [[64, 64], [48, 80], [80, 48]]
    drawn: dict[str, Any] = {"resolution": sizes, "train": {"seed": 3}}  # a step of each
    train({tmp_path / "single": drawn})
    on_ranks(2, train, {tmp_path / "ddp": drawn, tmp_path / "fsdp": drawn | FSDP})
    for name in ("ddp", "fsdp"):
        assert_same_run(tmp_path / "single", tmp_path / name)
