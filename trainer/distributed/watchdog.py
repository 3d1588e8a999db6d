"""Aborts a process that waits for a dead or stalled rank.

gloo times out by itself; a GPU waits for ever, and NCCL's own watchdog aborts the process without a
message. Here a thread watches the time, and names the rank that is dead or stalled.
"""

import os
import threading
import time

from trainer.distributed.failures import report_lost
from trainer.distributed.world import World
from trainer.errors import EXIT_FAILED

_MARGIN = 10.0  # seconds after `timeout`: gloo reports its own timeout first


class Watchdog:
    """Context manager; aborts if `alive` is not called for `timeout` (+ 10) seconds."""

    def __init__(self, world: World, timeout: float):
        self._world, self._limit = world, timeout + _MARGIN
        self._last, self._doing = time.monotonic(), ""
        self._stopped = threading.Event()

    def alive(self, doing: str) -> None:
        """Report progress: `doing` starts now."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        self.alive("the start")
        self._stopped.clear()
        if self._world.size > 1:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._limit / 10)):
            silent = time.monotonic() - self._last
            if silent > self._limit:
                report_lost(f"{self._doing} has not ended for {silent:.0f} s")
                os._exit(EXIT_FAILED)  # the main thread hangs in a collective
