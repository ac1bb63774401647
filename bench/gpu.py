"""All that is to be known of a GPU, in the order of its worth, within the minutes that one has it.

    python bench/gpu.py --out gpu --limit 540        # on a machine with a GPU; called again it goes on
    python bench/gpu.py --out gpu --rehearse         # the same plan on a CPU, with the tiny model
    python bench/gpu.py --prepare build/gpu          # here, before: what that machine may lack

Into --out go report.json (which step did what), log.txt, and the rows of the benches: checks.jsonl, step.jsonl,
kernels.jsonl, memory.jsonl, profile.txt and profile.json.gz. docs/gpu-day.md says what to do with them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rows import table
from speed.plan import Outcome, Step, carry_out

BENCH, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[1]
CARRIED = ROOT / "build" / "gpu"
PACKAGES = [
    "diffusers",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "typing_extensions",
    "importlib_metadata",
    "zipp",
]
"""What a machine with PyTorch and transformers may lack; carried in the versions that are installed here."""
TESTS = (
    "tests/runtime/test_graphs.py",
    "tests/runtime/test_fused_update.py",
    "tests/runtime/test_fused_adamw.py",
    "tests/runtime/test_fused_came.py",
    "tests/models/test_fp8.py",
    "tests/samples/test_overlap.py",
    "tests/kernels/test_training.py",
)


def plan(out: Path, *, rehearse: bool) -> list[Step]:
    """The most valuable first: whether it computes what it should, then how fast."""
    steps: list[Step] = []

    def add(name: str, what: str, seconds: float, script: str, *arguments: str) -> None:
        command = sys.executable, str(BENCH / script), *arguments, "--out", str(out)
        steps.append(Step(name, what, command, seconds))

    here = ("--device", "cpu", "--model", "tiny") if rehearse else ()
    few = ("--prompts", "1", "--points", "4", "--steps", "2") if rehearse else ("--steps", "10")

    def arms(*names: str) -> tuple[str, ...]:
        """On a CPU those that change something there."""
        known = ("published", "one_pass", "dual", "text_once", "fast", "lean")
        return ("--arms", *([name for name in names if name in known] or ["dual"] if rehearse else names))

    checks = ("methods", "operators", "--dtypes", "bf16") if rehearse else ()
    add("checks", "kernels, graphs, fused updates and steps against references", 120, "checks.py", *checks, *here)
    add("fast", "the fastest step", 100, "step.py", *arms("fast"), *few, *here)
    add("lean", "the leanest step", 90, "step.py", *arms("lean"), *few, *here)
    add("published", "our re-implementation of the published step", 70, "step.py", *arms("published"), *few, *here)
    add("profile", "where the time of the fastest step goes", 50, "timeline.py", *arms("fast"), *here)
    operators = ("--repeats", "2", "--samples", "1", "--models", "sana-600m") if rehearse else ("--quick",)
    device = ("--device", "cpu") if rehearse else ()
    some = ("--operators", "norm_modulate", "--ways", "eager") if rehearse else ("--ways", "kernel", "eager")
    add("kernels", "each fused operator against plain PyTorch", 80, "kernels.py", *operators, *some, *device)
    add(
        "updates",
        "optimizer steps, fused and plain",
        90,
        "step.py",
        *arms("came_plain", "adamw", "adamw_plain"),
        *few,
        *here,
    )
    many = ("--prompts", "4", "--steps", "5") if not rehearse else few
    add("prompts", "four prompts a rollout", 60, "step.py", *arms("fast", "lean"), *many, *here)
    add("memory", "peak memory by samples", 120, "memory.py", "--quick", "--rows-only", "--methods", "tbcm", *here)
    add("fp8", "an fp8 teacher", 60, "step.py", *arms("fp8"), *few, *here)
    chain = (
        "one_pass",
        "dual",
        "text_once",
        "half_weights",
        "no_recompute",
        "kernels",
        "compiled",
        "cuda_graph",
        "overlap",
    )
    add("chain", "what each change gives", 240, "step.py", *arms(*chain), *few, *here)
    chosen = TESTS[3:4] if rehearse else TESTS
    tests = sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(ROOT / name) for name in chosen)
    steps.append(Step("tests", "the suite's tests of what only a GPU does", tests, 90))
    return steps


def surroundings(carried: Path) -> tuple[Mapping[str, str], list[str]]:
    """The environment of every step, and what of `carried` was found: packages, a cache of compiled kernels and the
    native library. (Nothing is installed into the machine's own Python.)"""
    path, notes = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(BENCH)], []
    environment = {}
    if wheels := sorted(carried.glob("wheels/*.whl")):
        site = carried / "site"
        if not site.is_dir():
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--no-deps",
                "--target",
                str(site),
            ]
            subprocess.run([*command, *map(str, wheels)], check=True)
        path.append(str(site))
        notes.append(f"{len(wheels)} carried packages")
    if (cache := carried / "triton").is_dir():
        environment["TRITON_CACHE_DIR"] = str(cache)
        notes.append(f"a carried Triton cache of {sum(1 for _ in cache.glob('*/*.cubin'))} kernels")
    native = ROOT / "tbcm" / "runtime" / "_native"
    if (library := carried / "libtbcm_fused_update.so").is_file() and not native.is_dir():
        native.mkdir()
        shutil.copy2(library, native)
    notes.append("the native optimizer step" if native.is_dir() else "no native optimizer step: `make native` makes it")
    known = os.environ.get("PYTHONPATH")
    return environment | {"PYTHONPATH": os.pathsep.join([*path, *([known] if known else [])])}, notes


def prepare(folder: Path, python: str) -> None:
    """Wheels for Python `python` on Linux, and the native library, into `folder`."""
    import importlib.metadata as installed

    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}=={installed.version(name)}" for name in PACKAGES if _is_installed(name)]
    platforms = [f"--platform=manylinux{of}_x86_64" for of in ("2014", "_2_17", "_2_28")]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder / "wheels"), *wanted]
    subprocess.run(command, check=True)
    native = folder / "libtbcm_fused_update.so"
    subprocess.run([sys.executable, str(ROOT / "csrc" / "build.py"), "--out", str(native)], check=False)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{folder}: {len(wanted)} wheels, {'the' if native.is_file() else 'no'} native library, {size / 2**20:.1f} MiB"
    )


def _is_installed(name: str) -> bool:
    import importlib.metadata as installed

    try:
        return bool(installed.version(name))
    except installed.PackageNotFoundError:
        return False


def summary(outcomes: list[Outcome]) -> str:
    columns = {"name": "step", "status": "status", "seconds": "s", "limit": "at most", "what": "what"}
    return table([asdict(outcome) for outcome in outcomes], columns)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of all results (default: gpu)")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all (default: 540)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the tiny model")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=f"fill it (such as {CARRIED.relative_to(ROOT)})")
    parser.add_argument("--python", default="3.12", help="with --prepare: the version there (default: 3.12)")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare, options.python)
        return 0
    out = options.out.resolve()
    steps = plan(out, rehearse=options.rehearse)
    names = [step.name for step in steps]
    if unknown := [name for name in options.only or [] if name not in names]:
        print(f"error: --only {unknown[0]}: no such step; choose of {', '.join(names)}", file=sys.stderr)
        return 2
    environment, notes = surroundings(CARRIED)
    print("; ".join(notes), flush=True)
    steps = [step for step in steps if not options.only or step.name in options.only]
    limit = float("inf") if options.rehearse else options.limit
    outcomes = carry_out(steps, out, limit=limit, environment=environment)
    print(summary(outcomes))
    return 0 if all(outcome.status == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
