"""A run of a few lines, one rank of which fails as it is told: torchrun ... faulty_run.py FOLDER FAULT TIMEOUT."""

from __future__ import annotations

import math
import os
import signal
import sys
import time

import torch

from tbcm.errors import UserError, command
from tbcm.runtime import distributed
from tbcm.runtime.failure import reported
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.log import log_to_file, logger, setup_logging
from tbcm.runtime.signs import pulse
from tbcm.runtime.watchdog import Watchdog

STEP = 3


def sleep_for_ever() -> None:
    time.sleep(3600)


def fail(fault: str) -> None:
    if fault == "hang":
        sleep_for_ever()
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise ValueError("a bad\nday")
    elif fault == "user_error":
        raise UserError("the prompts of this rank are gone: bring them back")
    elif fault == "deadlock":
        with pulse.waiting():  # in some other collective than the rest
            sleep_for_ever()


@command
@reported
def main() -> int:
    folder, fault, timeout = sys.argv[1:]
    distributed.init("cpu")
    setup_logging()
    log_to_file(folder)
    logger.info("process %d", os.getpid())
    guard = NonFiniteGuard(max_in_a_row=2)
    with Watchdog(float(timeout)):
        for step in range(6):
            pulse.beat(step)
            is_faulty = step == STEP and distributed.rank() == 1
            if is_faulty and fault != "hang":
                fail(fault)
            with pulse.waiting():
                distributed.any_rank(False)
            if is_faulty and fault == "hang":
                fail(fault)
            loss = torch.tensor(math.nan if fault == "nan" and distributed.rank() == 1 else 1.0)
            guard.update(distributed.all_true(loss.isfinite()), loss)  # here the other waits, and seems to work
            guard.check(step, None)
    logger.info("done")
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
