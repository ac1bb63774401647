"""A run that is started again until it has reached its last step, as a cluster's scheduler does it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torchrun
from end_state import rows
from torchrun import Layout, Start

RESTARTS = 2  # that an agent makes by itself before it gives up, and the run has to be started anew
STUCK, GRACE = 180.0, 20.0  # seconds until a run must have gone on, and processes be gone that a signal has to end


class SoakError(Exception):
    """What must not happen has happened."""


class SupervisedRun:
    """A run's folder and the job in it."""

    def __init__(self, folder: Path, layout: Layout, start: Start, arguments: list[str]) -> None:
        self.folder, self.layout, self._start = folder, layout, start
        self.log = folder.with_suffix(".log")
        self._arguments = [*arguments, "--device", "cpu", "--resume", f"out={folder}"]
        self._agents: list[torchrun.Process] = []
        self.starts = 0

    def agents(self) -> list[torchrun.Process]:
        """Those that live; without torchrun, the one process."""
        return [agent for agent in self._agents if torchrun.exit_code(agent) is None]

    def ranks(self) -> list[int]:
        if not self.layout.nodes:
            return [agent.pid or 0 for agent in self.agents()]
        return [rank for agent in self.agents() for rank in torchrun.ranks(agent)]

    def supervise(self) -> bool:
        """Whether the run has reached its last step. Starts the job where there is none, or a part of it has failed."""
        codes = [torchrun.exit_code(agent) for agent in self._agents]
        if codes and not any(codes):
            return None not in codes
        self.stop()
        self.starts += 1
        self._agents = self._start(self.layout, self._arguments, RESTARTS, self.log)
        return False

    def stop(self) -> None:
        """As a cluster ends a job of which one process has failed: SIGTERM, and later SIGKILL to what is left.

        An agent that waits for another in a rendezvous does not answer to the first; ranks must follow their agent.
        """
        ranks = self.ranks()
        for number in signal.SIGTERM, signal.SIGKILL:
            for agent in self.agents():
                torchrun.send(agent.pid or 0, number)
            if torchrun.wait(lambda: not self.agents() and not any(map(torchrun.alive, ranks)), GRACE):
                return
        for rank in ranks:
            torchrun.send(rank, signal.SIGKILL)
        raise SoakError(f"agents are gone, and {GRACE:.0f} s later not all of their ranks {ranks}")

    def kill(self) -> None:
        for pid in [*self.ranks(), *(agent.pid or 0 for agent in self.agents())]:
            torchrun.send(pid, signal.SIGKILL)

    def rows_since(self, moment: float) -> list[dict[str, Any]]:
        return [row for row in rows(self.folder) if row["time"] > moment]

    def wait(self, moment: float, count: int) -> bool:
        """Waits for so many rows of metrics since `moment`; False if the run ended before."""
        starts = self.starts
        for _ in torchrun.every(0.02, STUCK):
            if len(self.rows_since(moment)) >= count:
                return True
            if self.supervise():
                return False
            if self.starts > starts + 1:
                raise SoakError("the run has failed by itself, before it made a step")
        raise SoakError(f"the run has not gone on within {STUCK:.0f} s")

    def finish(self) -> None:
        """Waits for the end of a run that nobody kills any more."""
        starts = self.starts
        for _ in torchrun.every(0.02, 2 * STUCK):
            if self.supervise():
                return
            if self.starts > starts + 1:
                raise SoakError("the run has failed by itself")
        raise SoakError(f"the run has not ended within {2 * STUCK:.0f} s")

    def wait_for_save(self) -> bool:
        for _ in torchrun.every(0.001, STUCK):
            if any((self.folder / "checkpoints").glob(".tbcm-*")):
                return True
            if self.supervise():
                return False
        raise SoakError(f"the run has saved nothing within {STUCK:.0f} s")
