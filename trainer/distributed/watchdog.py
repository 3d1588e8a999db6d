"""Ends a process that waits for another rank in vain.

gloo gives up waiting by itself; a GPU waits for ever, and NCCL's own watchdog ends the process
without a word. Here a thread looks on, and names the rank that is gone or stands still.
"""

import os
import threading
import time

from trainer.distributed.failures import report_lost
from trainer.distributed.world import World
from trainer.errors import EXIT_FAILED

_MARGIN = 10.0  # seconds after `timeout` in which gloo may say itself what it waited for


class Watchdog:
    """As a context it watches; between two calls of `alive` may pass `timeout` seconds."""

    def __init__(self, world: World, timeout: float):
        self._world, self._patience = world, timeout + _MARGIN
        self._last, self._doing = time.monotonic(), ""
        self._over = threading.Event()

    def alive(self, doing: str) -> None:
        """Something begins now."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        self.alive("the start")
        self._over.clear()
        if self._world.size > 1:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._patience / 10)):
            silent = time.monotonic() - self._last
            if silent > self._patience:
                report_lost(f"{self._doing} has not ended for {silent:.0f} s")
                os._exit(EXIT_FAILED)  # the main thread hangs, and nothing else ends it
