"""Lock of a run folder, held by one run at a time.

An flock on a file of the folder: the operating system releases it when the process ends, so no
stale lock is left to clean up.
"""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from trainer.errors import UserError
from trainer.files import LOCK


class Lock:
    """Held from `acquire` until `release` or the end of the process."""

    def __init__(self, folder: Path):
        self._file = folder / LOCK
        self._stream: IO[str] | None = None
        self.note = ""
        """A warning for the user, where the file system has no locks."""

    @property
    def held(self) -> bool:
        return self._stream is not None

    def acquire(self) -> None:
        """Raises UserError where another run holds the lock."""
        try:
            stream = self._file.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run.dir: {self._file.parent} cannot be written ({error.strerror})"
            ) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise UserError(
                f"run.name: {self._file.parent} is in use by {stream.read().strip()}; accepted: "
                "another run.name, or wait until that run has ended"
            ) from error
        except OSError as error:
            self.note = (
                f"{self._file.parent} is on a file system without locks ({error.strerror}): "
                "a second run in it is not refused"
            )
        self._stream = stream
        if not self.note:
            with suppress(OSError):  # a full disk: the lock is held regardless
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                stream.flush()

    def release(self) -> None:
        if self._stream is not None:
            with suppress(OSError):
                self._stream.truncate(0)
                self._stream.close()
            self._stream = None
