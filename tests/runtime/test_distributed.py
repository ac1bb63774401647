from __future__ import annotations

import itertools
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tbcm.errors import UserError
from tbcm.runtime import checkpoint, distributed
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.seeding import generator


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert not distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_reduce_mean({"loss": torch.tensor(2.0)}) == {"loss": torch.tensor(2.0)}
    assert distributed.local_slice(5) == slice(0, 5)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
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
    with pytest.raises(UserError, match="30 prompts a step cannot be shared by 4 ranks"):
        distributed.local_slice(30)


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, build_optimizer("came", model.parameters(), lr=1e-2)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(8, 4, generator=generator("cpu", 0, step, "x"))  # the global batch, on every rank
    model.zero_grad()
    model(x).square().mean().backward()
    _, finite = clip_and_check(model.parameters(), 1.0)
    gated_step(optimizer, finite)


def refuse() -> None:
    raise UserError("rank 0 says no")


def two_ranks(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init("cpu")
    whole = torch.randn(6, generator=generator("cpu", 0, 0, "noise"))
    means = distributed.all_reduce_mean({"b": torch.tensor(rank * 2.0), "a": whole[distributed.local_slice(6)].mean()})
    said = ""
    try:
        distributed.run_on_main(refuse)
    except UserError as error:
        said = str(error)
    chosen = distributed.run_on_main(lambda: f"by rank {rank}")
    stop = [distributed.any_rank(flag) for flag in (False, rank == 1)]

    model, optimizer = model_and_optimizer()
    train_step(model, optimizer, 0)
    saved = checkpoint.save(folder, 1, {"student": model, "optimizer": optimizer}, config={})
    other, other_optimizer = model_and_optimizer()
    manifest = checkpoint.load(folder, {"student": other, "optimizer": other_optimizer})
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    report = {"a": means["a"].item(), "b": means["b"].item(), "whole": whole.mean().item(), "said": said}
    report |= {"chosen": chosen, "stop": stop, "same": same, "ranks": manifest["ranks"], "saved": str(saved)}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    distributed.barrier()
    distributed.shutdown()


def test_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, args=(port, tmp_path), nprocs=2)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["a"] == pytest.approx(report["whole"], abs=1e-6)
        assert report["b"] == 1.0
        assert report["said"] == "rank 0 says no"
        assert report["chosen"] == "by rank 0"
        assert report["stop"] == [False, True]
        assert report["same"]
        assert report["ranks"] == 2

    # Two ranks' checkpoint continues bit for bit in one process.
    model, optimizer = model_and_optimizer()
    checkpoint.load(tmp_path, {"student": model, "optimizer": optimizer})
    train_step(model, optimizer, 1)
    straight, straight_optimizer = model_and_optimizer()
    for step in range(2):
        train_step(straight, straight_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))
