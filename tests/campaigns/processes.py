"""Processes of a start, found by the mark that `tests.helpers.start` gives them, and their ports."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "RANKCAST_TEST_MARK"
_LISTENS = "0A"  # the state in /proc/net/tcp

Socket = tuple[int, str]
"""(port, inode): the inode tells it from another process's later socket on the same port."""


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Environment of every live process of a start, by process id; of all network namespaces."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            variables = process.environ()
            if variables.get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = variables
    return found


def listening(pids: list[int]) -> set[Socket]:
    """Sockets on which these processes listen, each in its own network namespace."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it may end meanwhile
            sockets, own = _sockets(f"/proc/{pid}"), set()
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    own.add(str(file.readlink()))
            found |= {item for item in sockets if f"socket:[{item[1]}]" in own}
    return found


def still_open(sockets: set[Socket]) -> list[int]:
    """Ports among those of `sockets` (of this namespace) that are still listened on."""
    return sorted(port for port, _ in sockets & _sockets("/proc/self"))


def _sockets(process: str) -> set[Socket]:
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(process, "net", name).read_text().splitlines()[1:]
    ]
    return {(int(f[1].rsplit(":", 1)[1], 16), f[9]) for f in lines if f[3] == _LISTENS}


def left_over(mark: str, seconds: float) -> list[int]:
    """Processes of a start that have not ended within `seconds`; they are killed."""
    deadline = time.monotonic() + seconds
    while (left := sorted(marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return left
