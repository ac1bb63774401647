"""All commands as one: `tbcm NAME ...` is `python -m tbcm.NAME ...`."""

from __future__ import annotations

import argparse
import importlib
import sys

from tbcm import __version__
from tbcm.runtime.commit import commit

COMMANDS = {
    "train": "distil a teacher into a student of few steps",
    "sample": "images of a run's student, or of a teacher",
    "evaluate": "measure images, agreement with the teacher, and speed",
    "export": "a diffusers pipeline, or an adapter, of a run",
    "encode": "a file of prompts, encoded once for many runs",
    "encode-images": "images and captions as latents, for the baselines",
    "convert": "a single checkpoint file to a diffusers folder",
    "figures": "the paper's figures, of any teacher or run",
}
_MODULES = {"encode-images": "tbcm.encode_images", "figures": "tbcm.figures.__main__"}


def version() -> str:
    """With the commit, in a checkout."""
    at = commit()
    return f"tbcm {__version__}" + (f" ({at})" if at else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tbcm",
        description="Distil a text-to-image diffusion teacher into a student of few steps, from prompts alone.",
        epilog="commands:\n" + "\n".join(f"  {name:14} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="tbcm COMMAND --help says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    arguments = parser.parse_args()
    name = arguments.command
    sys.argv = [f"tbcm {name}", *arguments.arguments]
    module = importlib.import_module(_MODULES.get(name, f"tbcm.{name}"))
    code: int = module.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
