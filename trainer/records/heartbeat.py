"""heartbeat.json: what a run is doing, for people and monitors outside. Rank 0 writes it.

    {"state": "running", "step": 120, "steps": 2000, "time": 1790000000.0, "loss": 1.93, …}

`state` is starting, running, evaluating, done, interrupted (start it again and it goes on) or
failed. A process that was killed leaves what it did, and a `time` that no longer changes.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from trainer.config.yaml import parse_json
from trainer.errors import EXIT_FAILED, EXIT_REQUEUE
from trainer.files import HEARTBEAT, write_text

EXIT_RUNNING = 3
EXIT_CODES = {"done": 0, "interrupted": EXIT_REQUEUE, "failed": EXIT_FAILED}
"""What `launch/watch.py RUN --once` ends in, by state; `EXIT_RUNNING` in every other."""

_EVERY = 1.0  # seconds at least between two beats


class Heartbeat:
    """Writes the file, whole or not at all; a full disk never stops a run here."""

    def __init__(self, folder: Path):
        self._file, self._last = folder / HEARTBEAT, 0.0
        self._values: dict[str, Any] = {
            "state": "starting", "step": 0, "steps": 0, "host": socket.gethostname(),
            "pid": os.getpid(), "started": time.time(),
        }  # fmt: skip
        if "SLURM_JOB_ID" in os.environ:
            self._values["slurm_job"] = os.environ["SLURM_JOB_ID"]

    def beat(self, **values: Any) -> None:
        """A step was done: `values` replace those of the same name. Written once a second."""
        self._values |= {"state": "running", **values}
        if time.monotonic() - self._last >= _EVERY:
            self.write()

    def tell(self, state: str, **values: Any) -> None:
        """Something else than steps goes on, and may take long."""
        self._values |= {"state": state, **values}
        self.write()

    def end(self, state: str, reason: str = "") -> None:
        """The last word of this process."""
        self._values |= {"state": state, **({"reason": reason} if reason else {})}
        self.write()

    def write(self) -> None:
        """Write now."""
        self._last = time.monotonic()
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps({**self._values, "time": time.time()}))


def read_heartbeat(folder: Path) -> dict[str, Any]:
    """What the file says; {} where there is none, or none that can be read."""
    try:
        values = parse_json((folder / HEARTBEAT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
