"""Starts the ranks of one machine, as torchrun does, without importing torch: that takes seconds
before a rank begins."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from trainer.errors import EXIT_REQUEUE, UserError

_MARK = "RANKCAST_LOCAL_RANKS"
"""Set for the ranks, whose command line is that of this process."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_GRACE = 15.0
"""Seconds in which ranks see that another has failed, and say so; and again, once terminated."""
_POLL = 0.05


def is_rank() -> bool:
    """Whether `run_ranks` has started this process."""
    return _MARK in os.environ


def run_ranks(count: int) -> int:
    """Run this process's own command as `count` ranks, to their end. Returns 0, or the exit code of
    the first that failed. Raises UserError under another launcher."""
    if "RANK" in os.environ:
        raise UserError(
            "--processes: given to a rank of another launcher (RANK is set); accepted: without it "
            "under torchrun, deepspeed, accelerate and srun"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count, _MARK: count,
    }  # fmt: skip
    ranks: list[subprocess.Popen] = []
    with _forwarded(ranks):
        try:
            for rank in range(count):
                own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
                command = [sys.executable, *sys.orig_argv[1:]]
                ranks.append(subprocess.Popen(command, env=environment))
            return _wait(ranks)
        except BaseException:  # such as a limit of processes
            _send(ranks, signal.SIGKILL)
            raise


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    """Until all have ended; where one fails, the others have a while to end by themselves. After a
    request to stop each takes the time that it needs."""
    failed, steps = 0, [signal.SIGTERM, signal.SIGKILL]
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if not failed and (failed := next(filter(None, codes), 0)) and failed != EXIT_REQUEUE:
            deadline = time.monotonic() + _GRACE
        if None not in codes:
            return failed if failed >= 0 else 128 - failed
        if time.monotonic() > deadline and steps:
            _send(ranks, steps.pop(0))
            deadline = time.monotonic() + _GRACE
        time.sleep(_POLL)


def _send(ranks: Sequence[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            rank.send_signal(number)


@contextmanager
def _forwarded(ranks: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Within: signals go to the ranks, which save and end."""
    before = {
        number: signal.signal(number, lambda number, _: _send(ranks, number))
        for number in _SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # as SIGHUP under nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
