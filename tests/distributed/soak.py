"""Kills a run over and over, and compares what it ends with to a run that nobody disturbed.

    python tests/distributed/soak.py --kills 30 --seed 1

A tiny run is killed at random moments in random ways, goes on by torchrun's restarts or because it is started again
(with --resume, as always), and reaches its last step; then the next run, until there were enough kills. After each kill
every checkpoint in the folder must be readable; at its end a run must have the checkpoint and metrics of the
undisturbed one, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests")]

import torchrun  # noqa: E402
from end_state import differences, rows, unreadable  # noqa: E402
from supervised import GRACE, SoakError, SupervisedRun  # noqa: E402
from tiny import write_config, write_teacher  # noqa: E402
from torchrun import Layout  # noqa: E402

from tbcm.runtime import checkpoint  # noqa: E402

LAYOUTS = {"one": Layout(0), "ranks": Layout(1, 2), "nodes": Layout(2, 1)}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
KINDS = ["kill rank", "kill agent", "kill all", "kill rank in a save", "kill all in a save", "term agent", "term rank"]
ALONE = ["kill rank", "kill rank in a save", "term rank"]  # a process without torchrun is a rank without an agent


@dataclass(frozen=True)
class Undisturbed:
    folder: Path
    start: float  # seconds until its first row of metrics, and between two
    period: float


class Soak:
    """The kills of one run."""

    def __init__(self, run: SupervisedRun, like: Undisturbed, chance: random.Random) -> None:
        self.run, self.like, self.chance = run, like, chance
        self.lost = time.time()  # since then, no process from before the last kill is left
        self._pending: list[tuple[str, float]] = []  # kills after which the run has not gone on yet

    def kill(self) -> bool:
        """One kill at a random moment; False if the run ended before."""
        kind = self.chance.choice(KINDS if self.run.layout.nodes else ALONE)
        reached = self._wait(kind, while_starting=self.chance.random() < 0.2 and "save" not in kind)
        if reached is None or self.run.supervise():
            return False
        killed = time.time()
        gone = self._shoot(kind)
        if problems := unreadable(self.run.folder):
            raise SoakError(f"{kind}: {'; '.join(problems)}")
        self._pending.append(
            (f"{kind:19} {f'after step {reached}' if reached else 'while starting':15} {gone}", killed)
        )
        if kind.startswith("term") and reached and self._saved() < reached:
            raise SoakError(f"{kind}: was told to stop after step {reached} and saved step {self._saved()}")
        return True

    def report(self) -> None:
        """A line for each kill, when the run has gone on after it."""
        row = next(iter(self.run.rows_since(self.lost)), None)
        for line, killed in self._pending:
            end = f"went on after {row['time'] - killed:4.1f} s, at step {row['step']}" if row else "had ended"
            print(f"{line} {end}", flush=True)
        self._pending.clear()

    def _wait(self, kind: str, while_starting: bool) -> int | None:
        """The step that was last seen at the chosen moment, 0 for one before the first; None: the run has ended."""
        if while_starting:
            self.run.supervise()
            time.sleep(self.chance.uniform(0, self.like.start))
            return 0 if not self.run.rows_since(self.lost) else self._wait(kind, False)
        if not self.run.wait(self.lost, 1):
            return None
        self.report()
        if not self.run.wait(self.lost, self.chance.randint(1, 4)):
            return None
        if "save" in kind and not self.run.wait_for_save():
            return None
        time.sleep(self.chance.uniform(0, 0.03 if "save" in kind else self.like.period))
        return int(self.run.rows_since(self.lost)[-1]["step"])

    def _shoot(self, kind: str) -> str:
        """Sends the signal, and waits until all ranks of this moment are gone."""
        number = SIGNALS[kind.split()[0]]
        agents, ranks = [agent.pid or 0 for agent in self.run.agents()], self.run.ranks()
        if "all" in kind:
            targets = {*agents, *ranks}
        else:
            targets = {self.chance.choice(ranks if "rank" in kind and ranks else agents)}
        for pid in targets:
            torchrun.send(pid, number)
        sent = time.monotonic()
        if not torchrun.wait(lambda: not any(map(torchrun.alive, {*targets, *ranks})), GRACE):
            left = sorted(filter(torchrun.alive, {*targets, *ranks}))
            for pid in left:
                torchrun.send(pid, signal.SIGKILL)
            raise SoakError(
                f"{kind} (to {targets}): of agents {agents} and ranks {ranks}, {left} were left {GRACE} s on"
            )
        self.lost = time.time()
        return f"ranks gone in {time.monotonic() - sent:4.1f} s,"

    def _saved(self) -> int:
        path = checkpoint.latest(self.run.folder)
        return int(path.name.removeprefix("step-")) if path else -1


def undisturbed(run: SupervisedRun) -> Undisturbed:
    started = time.time()
    if not run.wait(0.0, 1):
        raise SoakError("the undisturbed run has no metrics")
    run.finish()
    if run.starts > 1:
        raise SoakError("the undisturbed run has failed")
    times = [row["time"] for row in rows(run.folder)]
    return Undisturbed(run.folder, times[0] - started, (times[-1] - times[0]) / max(1, len(times) - 1))


def disturbed(run: SupervisedRun, like: Undisturbed, chance: random.Random, kills: int) -> int:
    """How many kills it took to the run's end, at most `kills`."""
    soak, made = Soak(run, like, chance), 0
    while made < kills and soak.kill():
        made += 1
    run.finish()
    soak.report()
    problems = differences(run.folder, like.folder) + unreadable(run.folder)
    problems += [f"{path} is left over" for path in run.folder.glob(".tbcm-*")]
    if problems:
        raise SoakError(f"the run differs from the undisturbed one after {made} kills: {'; '.join(problems)}")
    return made


def soak(folder: Path, options: argparse.Namespace) -> None:
    start = {"torchrun": torchrun.start_torchrun, "fork": torchrun.start_forked}[options.start]
    (folder / "prompts.txt").write_text("\n".join(f"a {c} ball" for c in ("red", "green", "blue", "black", "white")))
    sections = {
        "train": {"steps": options.steps, "prompts_per_step": 4},
        # Periods without a common factor: means of logged steps begin before a checkpoint and end after it.
        "log": {"every": 2, "preview_every": 0},
        "checkpoint": {"every": 3},
    }
    teacher = write_teacher(folder / "teacher")
    config = write_config(folder / "config.yaml", teacher, folder / "prompts.txt", folder / "run", **sections)
    arguments, chance = [str(config), *options.overrides], random.Random(options.seed)
    likes: dict[str, Undisturbed] = {}
    made, runs, began = 0, 0, time.monotonic()
    for name in cycle(options.layouts):
        if made >= options.kills:
            break
        runs += 1
        run = SupervisedRun(folder / f"run-{runs}", LAYOUTS[name], start, arguments)
        reference = SupervisedRun(folder / f"undisturbed-{name}", LAYOUTS[name], start, arguments)
        current = reference
        try:
            if name not in likes:
                likes[name] = undisturbed(reference)
                print(
                    f"{name}: undisturbed, {likes[name].start:.1f} s to start, {likes[name].period:.2f} s a row",
                    flush=True,
                )
            current = run
            made += disturbed(run, likes[name], chance, options.kills - made)
            print(f"{name}: run {runs} is bit for bit the undisturbed one, {made} kills so far", flush=True)
        except SoakError as failure:
            tail = "\n".join(current.log.read_text(errors="replace").splitlines()[-40:])
            raise SoakError(f"{failure}\n--- end of {current.log}\n{tail}") from None
        finally:
            current.kill()
    print(f"{made} kills in {runs} runs, {time.monotonic() - began:.0f} s: nothing lost, every checkpoint readable")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills a run over and over; nothing may be lost.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["ranks", "nodes", "one"])
    parser.add_argument("--start", choices=["torchrun", "fork"], default="torchrun", help="fork: seconds less a start")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="of the configuration")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            soak(folder, options)
        except SoakError as failure:
            print(f"failed (seed {options.seed}): {failure}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
