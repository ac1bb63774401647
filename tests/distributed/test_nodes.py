"""Two torchrun agents as two nodes, with two ranks each, make the run that one process makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from end_state import newest
from ranks import free_port
from tiny import PROMPTS, metrics, write_config, write_teacher

from tbcm.train import main as train_here

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_nodes.sh")
TORCHRUN = Path(__file__).with_name("forking_torchrun.py")
NAMESPACES = ["unshare", "--map-root-user", "--net"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def namespaces_are_permitted() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return subprocess.run([*NAMESPACES, "bash", SCRIPT, "true"], capture_output=True).returncode == 0


def on_two_nodes(*command: str) -> list[subprocess.Popen[str]]:
    """`command` under torchrun on each: in a network of its own, or, where that is not permitted, on the loopback."""
    torchrun = f"{sys.executable} {TORCHRUN} tbcm.setup.parts,tbcm.training.trainer"
    agent = f"{torchrun} --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_id=test"
    port, options = free_port(), {"text": True, "stderr": subprocess.PIPE}
    # An agent knows its host's name and the address that this has, not that of a cable.
    host = "${NODE:+--rdzv_conf=is_host=$((1 - NODE))}"
    command = (f'exec {agent} --rdzv_endpoint=$FIRST:{port} --local_addr=$ADDRESS {host} "$@"', "agent", *command)
    if namespaces_are_permitted():
        return [subprocess.Popen([*NAMESPACES, "bash", SCRIPT, "bash", "-c", *command], env=environment(), **options)]
    loopback = environment(FIRST="127.0.0.1", ADDRESS="127.0.0.1")
    return [subprocess.Popen(["bash", "-c", *command], env=loopback, **options) for _ in range(2)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-4},
        "log": {"every": 1, "preview_every": 2},
        "checkpoint": {"every": 2},
        "parallel": {"mode": "fsdp", "timeout_minutes": 2},  # sharded inside a node, replicated across: HSDP
    }
    teacher = write_teacher(tmp_path / "teacher")
    return write_config(tmp_path / "c.yaml", teacher, tmp_path / "prompts.txt", tmp_path / "nodes", **sections)


def test_two_nodes_equal_one_process(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["-m", "tbcm.train", str(config), "--device", "cpu"]
    processes = on_two_nodes(*train)
    try:
        for process in processes:
            _, err = process.communicate()
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.terminate()
    monkeypatch.setattr(sys, "argv", [*train[1:], f"out={tmp_path / 'alone'}"])
    assert train_here() == 0

    nodes, one = newest(tmp_path / "nodes"), newest(tmp_path / "alone")
    assert nodes.keys() == one.keys()
    for name in filter(lambda name: name.startswith(("student.", "ema.")), one):
        torch.testing.assert_close(nodes[name], one[name], rtol=1e-4, atol=2e-6, msg=name)
    for a, b in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "nodes"), strict=True):
        for key in ("loss", "error", "grad_norm", "g_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3)
    sheets = sorted(path.name for path in (tmp_path / "nodes" / "images").iterdir())
    assert sheets == sorted(path.name for path in (tmp_path / "alone" / "images").iterdir()) and len(sheets) == 3
    logs = sorted((tmp_path / "nodes" / "logs").iterdir())
    assert [log.name for log in logs] == [f"rank-0000{rank}.log" for rank in range(4)]
    assert all("as rank" in log.read_text() for log in logs)
