"""Stop requests, by a signal, a time limit or the loss of the launcher.

SIGTERM, SIGUSR1, SIGINT and SIGHUP (unless it is ignored, as under nohup) set a flag. The loop
all-reduces it at every step, saves, and the process exits with `EXIT_REQUEUE`: restart to resume.
A second Ctrl-C exits at once.
"""

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

from trainer.config.sections import RunOptions
from trainer.distributed import launcher
from trainer.errors import EXIT_REQUEUE, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_PRESS = 1.0  # seconds: terminal and launcher may both forward one Ctrl-C


class Interrupted(UserError):
    """The run was asked to stop, and has saved: restart to resume."""

    exit_code = EXIT_REQUEUE


class StopRequest:
    """Stop request of this process. As a context manager, handles `SIGNALS`."""

    def __init__(self, options: RunOptions):
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._stack = ExitStack()
        self._wakeup: socket.socket | None = None
        # (deadline on the monotonic clock, which is never set back; reason)
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
        """The signal, time limit or loss that asked this process to stop, or None."""
        if self._reason is None:
            now = time.monotonic()
            late = next((reason for end, reason in self._deadlines if now >= end), None)
            self._reason = late or launcher.gone()
        return self._reason

    def raise_if_asked(self) -> None:
        """For work before the first step that the next start goes on with. Raises Interrupted."""
        if self.reason is not None:
            raise Interrupted(
                f"{self.reason}: stopped while data was tokenised; what is done is kept; restart "
                "to resume"
            )

    def __enter__(self) -> "StopRequest":
        self._stack.enter_context(launcher.saving())
        if threading.current_thread() is threading.main_thread():  # others cannot
            self._before = {
                name: signal.signal(name, self._on_signal)
                for name in SIGNALS
                if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN
            }
            ours, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            thread = threading.Thread(
                target=_watch_interrupts, args=(ours,), daemon=True, name="signals"
            )
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name


def _watch_interrupts(signals: socket.socket) -> None:
    """Exit at the second Ctrl-C. In a thread: Python handles signals in the main thread only after
    a blocking library call returns."""
    first: float | None = None
    with signals:
        while number := signals.recv(1):
            now = time.monotonic()
            if number[0] == signal.SIGINT:
                if first is not None and now - first > _SAME_PRESS:
                    os._exit(128 + signal.SIGINT)
                first = first or now
