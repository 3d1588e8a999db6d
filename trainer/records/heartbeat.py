"""heartbeat.json: the state of a run, for users and monitoring. Written by rank 0.

    {"state": "running", "step": 120, "steps": 2000, "time": 1790000000.0, "loss": 1.93, …}

`state` is starting, running, evaluating, done, interrupted (restart to resume) or failed. A killed
process leaves its last state, and a `time` that no longer changes.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.config.yaml import parse_json
from trainer.errors import EXIT_FAILED, EXIT_REQUEUE
from trainer.files import HEARTBEAT, write_text

EXIT_RUNNING = 3
EXIT_CODES = {"done": 0, "interrupted": EXIT_REQUEUE, "failed": EXIT_FAILED}
"""Exit codes of `rankcast watch RUN --once` by state; `EXIT_RUNNING` for all other states."""

_EVERY = 1.0  # minimum seconds between two writes by `beat`


class Heartbeat:
    """Writes the file atomically. Ignores I/O errors, so that a full disk does not stop the run."""

    def __init__(self, folder: Path):
        self._file, self._last = folder / HEARTBEAT, 0.0
        self._values: dict[str, Any] = {
            "state": "starting", "step": 0, "steps": 0, "host": socket.gethostname(),
            "version": __version__,
            "pid": os.getpid(), "started": time.time(),
        }  # fmt: skip
        if "SLURM_JOB_ID" in os.environ:
            self._values["slurm_job"] = os.environ["SLURM_JOB_ID"]

    def beat(self, **values: Any) -> None:
        """After a step: update `values`. The file is written at most once a second."""
        self._values |= {"state": "running", **values}
        if time.monotonic() - self._last >= _EVERY:
            self.write()

    def add(self, **values: Any) -> None:
        """Values that the next write holds."""
        self._values |= values

    def set_state(self, state: str, **values: Any) -> None:
        """Enter a phase other than training steps, such as an evaluation."""
        self._values |= {"state": state, **values}
        self.write()

    def end(self, state: str, reason: str = "") -> None:
        """Write the final state; `reason`: of a failure or interruption."""
        self._values |= {"state": state, **({"reason": reason} if reason else {})}
        self.write()

    def write(self) -> None:
        """Write now."""
        self._last = time.monotonic()
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps({**self._values, "time": time.time()}))


def read_heartbeat(folder: Path) -> dict[str, Any]:
    """Contents of the file; {} where it is missing or not readable."""
    try:
        if not (folder / HEARTBEAT).is_file():  # a named pipe would be waited for
            return {}
        values = parse_json((folder / HEARTBEAT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
