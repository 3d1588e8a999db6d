"""Lock of a run folder, held by one run at a time.

filelock's flock on a file of the folder: the operating system releases it when the process ends,
NFS when its host's lease does, so no stale lock is left to clean up. What filelock does not do is
here: the file names the holder, and a file system without locks is a note, no failure. Its soft
lock would be one there, but a host that died would keep a requeued job out of the folder for good.
"""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError
from trainer.files import LOCK

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """Held from `acquire` until `release` or the end of the process."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / LOCK
        self._lock = FileLock(self._file, blocking=False, fallback_to_soft=False)
        self.note = ""
        """A warning for the user, where the file system has no locks."""

    @property
    def held(self) -> bool:
        """Also where there is nothing to hold, and nobody else is kept out (`note`)."""
        return self._lock.is_locked or bool(self.note)

    def acquire(self) -> None:
        """Raises UserError where another run holds the lock."""
        try:
            self._lock.acquire()
        except Timeout as error:
            holder = self._file.read_text().strip() or "another process"
            raise UserError(
                f"run.name: {self._folder} is in use by {holder}; "
                "accepted: another run.name, or wait until that run has ended"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(
                    f"run.dir: {self._folder} cannot be written ({error.strerror})"
                ) from error
            self.note = (
                f"{self._folder} is on a file system without locks ({error.strerror}): "
                "a second run in it is not refused"
            )
        else:
            with suppress(OSError):  # a full disk: the lock is held regardless
                self._file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):
                self._file.write_text("")
        self.note = ""
        with suppress(OSError):
            self._lock.release()
