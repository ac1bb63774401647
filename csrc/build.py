"""Compiles the fused optimiser step (fused_update.cu) with nvcc: python csrc/build.py [--arch 80 90 ...]

Optional: without the library the same update runs in plain PyTorch (see optimizer.fused in the configuration). Needs
the CUDA toolkit and its host compiler; PyTorch is not involved, so that any version of it may load the library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "fused_update.cu"
LIBRARY = SOURCE.parents[1] / "tbcm" / "runtime" / "_native" / "libtbcm_fused_update.so"
# --fmad=false: the source says where a product and a sum are one rounding, so that a CPU gives the same bits.
OPTIONS = ["-O3", "-std=c++17", "--fmad=false", "-shared", "-Xcompiler", "-fPIC", "--resource-usage"]


class BuildError(Exception):
    """A line that says what is missing or went wrong."""


def find_nvcc() -> str:
    """$CUDA_HOME/bin/nvcc where that is set, else nvcc on PATH, else the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    where = " or ".join(candidates)
    raise BuildError(f"no CUDA compiler ({where}): install the CUDA toolkit or set CUDA_HOME; tbcm runs without")


def build(architectures: list[int], library: Path) -> str:
    """Writes `library`, whole or not at all, with machine code for each compute capability (80 for 8.0) and PTX of the
    highest, which the driver translates for later cards. Returns what the compiler says of each kernel's registers.
    """
    nvcc = find_nvcc()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    newest = max(architectures)
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # a running process keeps the library it loaded
        made = Path(folder) / library.name
        done = subprocess.run([nvcc, *OPTIONS, *targets, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            raise BuildError(f"{nvcc} could not compile {SOURCE} for {architectures}: its words are above")
        made.replace(library)
    return done.stdout + done.stderr


def expanded(path: str) -> Path:
    return Path(path).expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", type=int, default=[80, 90], help="compute capabilities, 80 for 8.0 (default: 80 90)"
    )
    parser.add_argument("--out", type=expanded, default=LIBRARY, help="default: where tbcm looks for it")
    parser.add_argument("--verbose", action="store_true", help="print each kernel's registers and spills")
    arguments = parser.parse_args()
    try:
        said = build(arguments.arch, arguments.out)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.verbose:
        print(said)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
