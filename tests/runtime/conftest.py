from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused import Side

from tbcm.runtime.native import load_library

ROOT = Path(__file__).parents[2]


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with a thesis, which nobody may touch."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The fused update for a CPU."""
    if (compiler := shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("no C++ compiler (g++, c++)")
    library = tmp_path_factory.mktemp("host") / "host.so"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    sources = [str(ROOT / "tests" / "csrc" / name) for name in ("host.cpp", "host_came.cpp")]
    subprocess.run([compiler, *options, *sources, "-o", str(library)], check=True)
    return load_library(library)


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The fused update for the GPU that is here."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    library = tmp_path_factory.mktemp("cuda") / "cuda.so"
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, ROOT / "csrc" / "build.py", "--arch", f"{major}{minor}", "--out", library]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if "no CUDA compiler" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return load_library(library)


@pytest.fixture(params=["cpu", "cuda"])
def side(request: pytest.FixtureRequest) -> Side:
    library = request.getfixturevalue("host_library" if request.param == "cpu" else "cuda_library")
    return Side(library, torch.device(request.param))
