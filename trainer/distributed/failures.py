"""How a failure ends a process: one line, by the rank that knows, and an exit code.

Without torch, so that a mistake in a configuration is told before torch is imported.
"""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from trainer.errors import EXIT_FAILED, EXIT_REQUEUE, UserError, first_line

_CONNECTION = "gloo|NCCL|TCPStore|pair closure|Connection (closed|reset)|Broken pipe"
"""How a collective complains that another rank is not there."""

_GRACE = 5.0
"""Seconds in which every rank that still works notices that another one does not."""


class FailedElsewhere(UserError):
    """Another rank failed and has said why; this one only leaves."""

    def __init__(self, exit_code: int):
        super().__init__("another rank failed")
        self.exit_code = exit_code


def exit_code(error: BaseException) -> int:
    """The code in which a failure ends the process."""
    return error.exit_code if isinstance(error, UserError) else EXIT_FAILED


def _missing() -> tuple[list[int], bool]:
    """(ranks that do not notice within seconds that the run has broken off: those that are gone or
    stalled; whether this rank is the lowest of the others)."""
    import torch.distributed as dist

    rank, others = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    noticed: set[int] = set()
    answers = threading.Event()

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # the store's process has left
            store.set(f"noticed/{rank}", "")
            while noticed != others:
                noticed.update(r for r in others - noticed if store.check([f"noticed/{r}"]))
                answers.set()
                time.sleep(0.1)

    # In the background: where rank 0 keeps the store and is itself stalled, it answers nobody.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_GRACE)
    missing = others - noticed if answers.is_set() else {0}
    return sorted(missing), rank == min({rank, *others} - missing)


def _in_process_group() -> bool:
    module = sys.modules.get("torch.distributed")  # not imported: never joined one
    return module is not None and module.is_initialized()


def report_lost(reason: str) -> None:
    """Say once which ranks are gone or stand still; where none is, each says what it waited for."""
    import torch.distributed as dist

    missing, spokesman = _missing()
    rank = dist.get_rank()
    who = f" [rank {rank}]" if rank > 0 else ""
    lost = f"rank {', '.join(map(str, missing))}" if missing else "another rank, though all answer"
    if spokesman or not missing:
        print(f"error:{who} lost {lost} ({reason})", file=sys.stderr, flush=True)


def report(error: BaseException) -> None:
    """Print a failure where a person sees it: one line, or a traceback where it is our mistake."""
    if isinstance(error, FailedElsewhere):
        return
    rank = int(os.environ.get("RANK", "0"))
    who = f" [rank {rank}]" if rank > 0 else ""
    if isinstance(error, UserError):
        kind = "stopped" if error.exit_code == EXIT_REQUEUE else "error"
        print(f"{kind}:{who} {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return
    connected = isinstance(error, RuntimeError) and _in_process_group()
    if connected and re.search(_CONNECTION, str(error)):
        report_lost(re.sub(r"\[\S+?\.(cc|cpp|h):\d+\] ", "", first_line(error)))
        return
    traceback.print_exception(error)
    print(f"error:{who} {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextmanager
def guarded() -> Iterator[None]:
    """End the process on any failure: one line, a non-zero exit code, nobody waited for."""
    try:
        yield
    except Exception as error:
        report(error)
        sys.stdout.flush()
        # Not sys.exit, and no farewell to the process group: both may wait for ranks that are gone.
        os._exit(exit_code(error))
