"""Waiting for ranks that work longer than `engine.timeout`.

A collective has that timeout, so it cannot wait for them. Instead every rank takes part, from a
thread, in a small collective every second: it says that this rank is there, and whether it still
works. What it limits is how long a rank may be silent. A rank that dies, or fails, ends the wait of
all others at once.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.failures import FailedElsewhere

_EVERY = 1.0  # seconds between two rounds while this rank works
_LOOK = 0.1

_DONE, _WORKING, _FAILED = range(3)


class Patience:
    """One stage of all ranks. On a single rank (`size` 1) it only asks `stop`."""

    def __init__(self, size: int, group: Any, stop: Callable[[], None]):
        """`stop` raises where this rank is asked to stop; `group`: a gloo group that nothing else
        uses meanwhile."""
        self._group, self._stop = group, stop
        self._state, self._seen = _WORKING, _WORKING
        self._changed = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if size > 1:
            self._thread = threading.Thread(target=self._rounds, daemon=True, name="patience")
            self._thread.start()

    def check(self) -> None:
        """Called now and then by who works: raises where this rank is to stop, another has failed
        (FailedElsewhere), or one is lost."""
        self._stop()
        if self._error is not None:
            raise self._error
        if self._seen == _FAILED:
            raise FailedElsewhere(0)

    def wait(self) -> None:
        """Wait until no rank works any more, or one has failed. Raises where this rank is to stop,
        or another is lost."""
        self._say(_DONE)
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK)
            self._stop()
        if self._error is not None:
            raise self._error

    def fail(self) -> None:
        """This rank has failed: tell the others. Raises where one of them is lost."""
        self._say(_FAILED)
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _say(self, state: int) -> None:
        self._state = state
        self._changed.set()

    def _rounds(self) -> None:
        try:
            while self._seen == _WORKING:
                self._changed.wait(_EVERY)
                state = torch.tensor([self._state])
                dist.all_reduce(state, dist.ReduceOp.MAX, group=self._group)
                self._seen = int(state)
        except RuntimeError as error:  # a rank is gone, or silent for too long
            self._error = error
