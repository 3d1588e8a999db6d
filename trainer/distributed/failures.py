"""Ends a process on failure: one error line on every host, and an exit code.

Imports no torch, so that a configuration error is reported before torch is imported.
"""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_FAILED, EXIT_REQUEUE, UserError, first_line

_CONNECTION = "gloo|NCCL|TCPStore|pair closure|Connection (closed|reset)|Broken pipe"
"""Errors that collectives raise when a peer is gone."""

_NOISE = r"\[\S+?\.(cc|cpp|h):\d+\] |\. This is typically caused by .*"
"""What such errors say besides: where in the library, and gloo's advice."""

_GRACE = 5.0
"""Seconds within which every live rank notices the loss of another."""
_POLL = 0.1  # seconds between two looks into the store


class FailedElsewhere(UserError):
    """Another rank failed and reports why; this one exits with the same code, silently unless it is
    `told` what to say to whoever looks at its own host."""

    def __init__(self, exit_code: int, told: str = ""):
        super().__init__(told or "another rank failed")
        self.exit_code, self.told = exit_code, told


def exit_code(error: BaseException) -> int:
    """Exit code of the process for `error`."""
    return error.exit_code if isinstance(error, UserError) else EXIT_FAILED


def _missing() -> tuple[list[int], bool]:
    """(ranks that are dead or stalled, as they set no flag in the store within `_GRACE`; whether
    this rank is the lowest live one of its host)."""
    import torch.distributed as dist

    rank, others = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    noticed: set[int] = set()
    responds = threading.Event()

    def poll() -> None:
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # the store's process is gone
            store.set(f"noticed/{rank}", "")
            while noticed != others:
                noticed.update(r for r in others - noticed if store.check([f"noticed/{r}"]))
                responds.set()
                time.sleep(_POLL)

    # In a thread: the store does not respond where it is in rank 0 and rank 0 is stalled.
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    thread.join(_GRACE)
    missing = others - noticed if responds.is_set() else {0}
    first_of_host = rank - int(os.environ.get("LOCAL_RANK", "0"))
    return sorted(missing), rank == min(set(range(first_of_host, rank + 1)) - missing)


def also_failing(key: str, rank: int, size: int, store: Any = None) -> set[int]:
    """The ranks that fail in the stage `key` as this one does, itself included: all that say so in
    the store within `_GRACE`. Not collective: others may be in a collective that this rank has
    left."""
    if size == 1:
        return {rank}
    if store is None:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
    failing, deadline = {rank}, time.monotonic() + _GRACE
    store.set(f"failing/{key}/{rank}", "")
    while len(failing) < size and time.monotonic() < deadline:
        failing |= {r for r in range(size) if store.check([f"failing/{key}/{r}"])}
        time.sleep(_POLL)
    return failing


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective raised `error` because a peer is gone."""
    connected = isinstance(error, RuntimeError) and _in_process_group()
    return connected and re.search(_CONNECTION, str(error)) is not None


def _in_process_group() -> bool:
    module = sys.modules.get("torch.distributed")  # not imported: never joined one
    return module is not None and module.is_initialized()


def _kills() -> int:
    """Processes that the system has killed for want of memory since it started."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


_KILLS = _kills()  # when this process began


def killed_for_memory() -> bool:
    """Whether the system has killed a process of this host for want of memory since this one began:
    it has no time to say so itself."""
    return _kills() > _KILLS


def report_lost(reason: str) -> None:
    """Print, once on every host, which ranks are dead or stalled; if none is, every rank prints its
    `reason`."""
    import torch.distributed as dist

    missing, is_lowest = _missing()
    rank = dist.get_rank()
    who = f" [rank {rank}]" if rank > 0 else ""
    if killed_for_memory():
        reason += "; meanwhile the system has killed a process on this host for want of memory"
    lost = f"rank {', '.join(map(str, missing))}" if missing else "another rank, though all respond"
    if is_lowest or not missing:
        print(f"error:{who} lost {lost} ({reason})", file=sys.stderr, flush=True)


def report(error: BaseException) -> None:
    """Print a failure to stderr: one line for a UserError or a lost rank, a traceback for a bug."""
    if isinstance(error, FailedElsewhere) and not error.told:
        return
    rank = int(os.environ.get("RANK", "0"))
    who = f" [rank {rank}]" if rank > 0 else ""
    if isinstance(error, UserError):
        kind = "stopped" if error.exit_code == EXIT_REQUEUE else "error"
        print(f"{kind}:{who} {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return
    if not isinstance(error, Exception):
        print(f"error:{who} a library failed: {first_line(error)}", file=sys.stderr, flush=True)
        return
    if is_lost_connection(error):
        report_lost(re.sub(_NOISE, "", first_line(error)))
        return
    traceback.print_exception(error)
    print(f"error:{who} {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextmanager
def guarded() -> Iterator[None]:
    """Exit on any failure, with a report and a non-zero code, without waiting for other ranks."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a library's panic is no Exception
        with suppress(OSError):  # the terminal, or who reads the output, may be gone
            report(error)
            sys.stdout.flush()
        # Not sys.exit, and no destroy_process_group: both may wait for ranks that are gone.
        os._exit(exit_code(error))
