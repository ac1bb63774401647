"""Which state of the sources runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit(*changed: str) -> str | None:
    """The commit of the checkout that this package is in, or None where it is in none; with a "+" where tracked files
    under `changed`, git's path patterns from the checkout's root (default: the package), differ from it."""
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        differs = git("status", "--porcelain", "--untracked-files=no", "--", *(changed or ("tbcm", "kernels")))
        return git("rev-parse", "--short", "HEAD") + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return None
