"""Whether the launcher of this rank (torchrun, deepspeed, …) still runs. Imports no torch.

A launcher that is killed, or ends at a signal that it does not handle, leaves its ranks behind.
They look at those of their ancestors whose command line holds the script that this rank runs, such
as `deepspeed launch/train.py`, and at torchrun's agent. A shell that started a launcher is none of
them, so it may end. The kernel's parent-death signal would not do: it comes when the *thread* that
started a process ends, and not from the launcher of a launcher.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import EXIT_REQUEUE, UserError

_EVERY = 1.0  # seconds between two looks
_INIT = 1
_AGENT = "TORCHELASTIC_RUN_ID"

_ACCELERATE = {
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "engine.kind=deepspeed"),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "engine.kind=fsdp2"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "an engine of engine.kind"),
}
"""Engines that `accelerate launch` asks a script for: (its option, what is used here)."""

_ancestors: list[tuple[int, str]] = []
"""(process, start time) of the launchers, the nearest first."""
_saves = 0
_watching = False


def watch() -> None:
    """Find the launchers, and from now on end this process when one of them is gone, except within
    `saving`. Call it first: what ends before is not noticed."""
    global _watching
    if _watching or "RANK" not in os.environ:
        return
    _watching = True
    _ancestors.extend(_launchers())
    if _ancestors:
        threading.Thread(target=_watch, daemon=True, name="launcher").start()


def gone() -> str | None:
    """What to say of a launcher that is gone; None where all of them run."""
    for process, started in _ancestors:
        if _started(process) != started:
            return f"the launcher (process {process}) is gone"
    return None


def refuse_accelerate_engine() -> None:
    """Raises UserError where `accelerate launch` was told of an engine, which only a script that
    uses its Accelerator would have."""
    for variable, (option, ours) in _ACCELERATE.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate launch: {option} given, by an argument or its configuration file; "
                f"accepted: --multi_gpu without it, and {ours} in the configuration"
            )


def remarks() -> list[str]:
    """What to say where a container's process 1 is a launcher that SIGTERM does not reach."""
    if _INIT not in (process for process, _ in _ancestors) or _catches(_INIT, signal.SIGTERM):
        return []
    return [
        "process 1 is the launcher and does not handle SIGTERM, which the kernel therefore drops: "
        "stopping this container loses the steps since the last checkpoint; start it with --init, "
        "or use torchrun"
    ]


@contextmanager
def saving() -> Iterator[None]:
    """Within it the caller asks `gone`, and saves; this process is not ended."""
    global _saves
    _saves += 1
    try:
        yield
    finally:
        _saves -= 1


def _watch() -> None:
    while True:
        time.sleep(_EVERY)
        reason = gone()
        if reason is not None and not _saves:
            with suppress(OSError):  # the launcher's terminal may be gone too
                print(f"stopped: {reason}", file=sys.stderr, flush=True)
            os._exit(EXIT_REQUEUE)


def _launchers() -> list[tuple[int, str]]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    scripts = {sys.argv[0], getattr(spec, "name", None)} - {"", "-c", None}
    found: list[tuple[int, str]] = []
    process, agent = os.getppid(), os.environ.get(_AGENT)
    while process > 0 and (started := _started(process)) is not None:
        if agent is not None and f"{_AGENT}={agent}" not in _strings(process, "environ"):
            agent = None  # the nearest process that does not have it is the one that set it
            is_launcher = True
        else:
            is_launcher = not scripts.isdisjoint(_strings(process, "cmdline"))
        if is_launcher:
            found.append((process, started))
        elif agent is None:
            break
        process = _parent(process)
    return found


def _catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return True  # not known
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "")
    return not caught or bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _strings(process: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; [] where the process does not run."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    fields = text.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


def _started(process: int) -> str | None:
    fields = _stat(process)
    return fields[19] if fields else None


def _parent(process: int) -> int:
    fields = _stat(process)
    return int(fields[1]) if fields else 0
