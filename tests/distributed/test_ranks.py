"""Two ranks (gloo, spawned) make the run that one rank makes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tiny import metrics, tiny_config, tiny_parts
from torch import multiprocessing

from tbcm.runtime import distributed
from tbcm.trainer import Trainer


def train(rank: int, world: int, port_file: str, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(port_file).read_text()}
    device = distributed.init("cpu")
    # Plain gradient descent would be compared best; the few steps of AdamW keep rounding from growing.
    config = tiny_config(
        Path(out), train={"steps": 3, "points_per_micro_batch": 2}, log={"every": 1}, optimizer={"lr": 1e-4}
    )
    trainer = Trainer(config, device, tiny_parts(config))
    trainer.run()
    if distributed.is_main():
        torch.save(trainer.student.state_dict(), Path(out) / "student.pt")
    del trainer
    distributed.shutdown()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    multiprocessing.spawn(train, (2, str(tmp_path / "port"), str(tmp_path / "two")), nprocs=2)
    multiprocessing.spawn(train, (1, "", str(tmp_path / "one")), nprocs=1)
    one, two = (torch.load(tmp_path / n / "student.pt", weights_only=True) for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6, msg=name)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "error", "grad_norm", "kept", "g_norm"):
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-6)
