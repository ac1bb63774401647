"""New processes that start in a tenth of a second: a server forks them, which has imported what takes others 10."""

from __future__ import annotations

import multiprocessing

multiprocessing.set_forkserver_preload(["tbcm.train", "tbcm.evaluate", "tbcm.random_parts"])
processes = multiprocessing.get_context("forkserver")
"""Has the environment of the first start: what a function needs in its own, it is to be given."""
