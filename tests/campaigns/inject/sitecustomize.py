"""Faults inside a rank: Python imports this file at its start where PYTHONPATH names its folder.

RANKCAST_INJECT=nan:5      the loss of step 5, counted from 0, is not a number
RANKCAST_INJECT=clock:5    from that step on, the clock is a day behind
"""

import os
import sys
import time


def install(what: str, step: int) -> None:
    from trainer.training import step as training_step

    honest, honest_time = training_step.accumulate, time.time

    def accumulate(session, batch, index):
        total = honest(session, batch, index)
        if what == "clock" and index == step:
            time.time = lambda: honest_time() - 86400
        return total * float("nan") if what == "nan" and index == step else total

    training_step.accumulate = accumulate


class OnImport:
    """Installs the fault as soon as the trainer's loop is there."""

    def find_spec(self, name, path=None, target=None):
        if name == "trainer.run.run":
            sys.meta_path.remove(self)
            fault, step = os.environ["RANKCAST_INJECT"].split(":")
            install(fault, int(step))


if "RANKCAST_INJECT" in os.environ and "RANK" in os.environ:
    sys.meta_path.insert(0, OnImport())
