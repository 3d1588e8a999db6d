"""Asked to stop, by a signal or by the clock.

SIGTERM, SIGUSR1 and SIGINT only leave a note; the loop asks all ranks for it at every step, saves,
and the process ends in `EXIT_REQUEUE`: started again, the run goes on. Ctrl-C a second time leaves
at once.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from trainer.config.sections import RunOptions
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
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup: socket.socket | None = None
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
            ours, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_count, args=(ours,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name


def _count(signals: socket.socket) -> None:
    """Leave at the second Ctrl-C. In a thread: Python tells the main one of signals only once it is
    back from whatever library it waits in."""
    first: float | None = None
    with signals:
        while number := signals.recv(1):
            now = time.monotonic()
            if number[0] == signal.SIGINT:
                if first is not None and now - first > _SAME_PRESS:
                    os._exit(128 + signal.SIGINT)
                first = first or now
