from __future__ import annotations

import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from tbcm.errors import UserError
from tbcm.runtime import checkpoint, distributed
from tbcm.runtime.ema import EMA
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.seeding import generator


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert not distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert torch.equal(distributed.all_reduce_sum(torch.tensor([2.0, 3.0])), torch.tensor([2.0, 3.0]))
    assert distributed.local_slice(5) == slice(0, 5)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.all_true(torch.tensor(True))
    assert distributed.run_on_main(lambda: 3) == 3
    distributed.barrier()
    distributed.shutdown()


def test_shares_are_contiguous_equal_and_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(range(32))[distributed.local_slice(32)])
    assert [len(share) for share in shares] == [8] * 4
    assert list(itertools.chain(*shares)) == list(range(32))
    # Rank 3 has prompts 24 to 31.
    assert distributed.local_slices(32, None) == [slice(24, 32)]
    assert distributed.local_slices(32, 3) == [slice(24, 27), slice(27, 30), slice(30, 32)]
    assert distributed.local_slices(32, 100) == [slice(24, 32)]
    with pytest.raises(UserError, match="30 prompts a step cannot be shared by 4 ranks"):
        distributed.local_slice(30)


class Run:
    def __init__(self, optimizer: str, sharded: bool = False) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Linear(6, 3))
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        self.optimizer = build_optimizer(optimizer, self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.ema = EMA(self.model)

    @property
    def state(self) -> dict[str, Any]:
        return {"student": self.model, "optimizer": self.optimizer, "ema": self.ema}

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            x = torch.randn(8, 4, generator=generator("cpu", 0, step, "x"))  # the global batch, on every rank
            self.optimizer.zero_grad()
            (self.model(x).square().mean() * (float("nan") if step == 1 else 1)).backward()
            _, finite = clip_and_check(self.model.parameters(), 1.0)
            gated_step(self.optimizer, finite)
            self.ema.update(self.model, finite)
        return self

    def weights(self) -> list[Tensor]:
        found = [*self.model.state_dict().values(), *self.ema.shadow.values()]
        return [value.full_tensor() if isinstance(value, DTensor) else value for value in found]


ARMS = [("adamw", False), ("adamw", True), ("came", False)]


def save_and_load(folder: Path, optimizer: str, sharded: bool) -> bool:
    run, other = Run(optimizer, sharded).train(0, 3), Run(optimizer, sharded)
    checkpoint.save(folder / f"{optimizer}-{sharded}", 3, run.state, config={})
    checkpoint.load(folder / f"{optimizer}-{sharded}", other.state)
    return all(map(torch.equal, run.weights(), other.weights()))


def refuse() -> None:
    raise UserError("rank 0 says no")


def two_ranks(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init("cpu")
    noise = torch.randn(6, generator=generator("cpu", 0, 0, "noise"))
    sums = distributed.all_reduce_sum(
        torch.stack([noise[distributed.local_slice(6)].sum() / 6, torch.tensor(float(rank))])
    )
    report: dict[str, Any] = {"a": sums[0].item(), "b": sums[1].item(), "noise": noise.mean().item()}
    try:
        distributed.run_on_main(refuse)
    except UserError as error:
        report["said"] = str(error)
    report["chosen"] = distributed.run_on_main(lambda: f"by rank {rank}")
    report["stop"] = [distributed.any_rank(flag) for flag in (False, rank == 1)]
    report["all_true"] = [bool(distributed.all_true(torch.tensor(flag))) for flag in (True, rank == 1)]
    try:
        Run("came", sharded=True)
    except UserError as error:
        report["refused"] = str(error)
    report["restored"] = [save_and_load(folder, *arm) for arm in ARMS]
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    distributed.barrier()
    distributed.shutdown()


def test_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(two_ranks, args=(port, tmp_path), nprocs=2)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["a"] == pytest.approx(report["noise"], abs=1e-6)
        assert report["b"] == 1.0
        assert report["said"] == "rank 0 says no"
        assert report["chosen"] == "by rank 0"
        assert report["stop"] == [False, True]
        assert report["all_true"] == [True, False]
        assert "CAME takes no sharded weights: set optimizer.name=adamw" in report["refused"]
        assert report["restored"] == [True] * len(ARMS)

    for optimizer, sharded in ARMS:  # the two ranks' checkpoint goes on in this one process, and as if never sharded
        resumed, straight = Run(optimizer), Run(optimizer).train(0, 5)
        assert checkpoint.load(tmp_path / f"{optimizer}-{sharded}", resumed.state)["ranks"] == 2
        resumed.train(3, 5)
        for a, b in zip(resumed.weights(), straight.weights(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if sharded else 0)
