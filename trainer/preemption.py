"""Asked to stop, by a signal or by the clock.

SIGTERM, SIGUSR1 and SIGINT only leave a note; the loop asks all ranks for it at every step, saves,
and the process ends in `EXIT_REQUEUE`: started again, the run goes on. Ctrl-C a second time leaves
at once.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from trainer.config import RunOptions
from trainer.errors import EXIT_REQUEUE, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_PRESS = 1.0  # seconds: a terminal and a launcher may both pass one Ctrl-C on


class Interrupted(UserError):
    """The run was asked to stop, and saved; started again it goes on."""

    exit_code = EXIT_REQUEUE


class StopRequest:
    """Whether this process was asked to stop. As a context it listens to `SIGNALS`."""

    def __init__(self, options: RunOptions):
        self._reason: str | None = None
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        # (moment of the monotonic clock, which nobody sets back; what ends then)
        self._deadlines: list[tuple[float, str]] = []
        if options.max_hours is not None:
            end = time.monotonic() + options.max_hours * 3600
            self._deadlines.append((end, f"run.max_hours: {options.max_hours:g}"))
        job_end = os.environ.get("SLURM_JOB_END_TIME", "")
        if job_end.isdigit():
            left = int(job_end) - time.time() - options.slurm_margin
            self._deadlines.append((time.monotonic() + left, "the SLURM job's time limit"))

    @property
    def reason(self) -> str | None:
        """Who or what asked this process to stop; None: nobody did."""
        if self._reason is None:
            now = time.monotonic()
            self._reason = next((what for end, what in self._deadlines if now >= end), None)
        return self._reason

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there can it listen
            self._before = {name: signal.signal(name, self._note) for name in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > _SAME_PRESS:
                os._exit(128 + signal.SIGINT)
            self._interrupted_at = self._interrupted_at or now
        self._reason = self._reason or signal.Signals(number).name
