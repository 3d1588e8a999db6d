"""Start of CUDA's driver beside the imports: it waits for the hardware, they for the CPU.

The driver is a process's own; what calls it later, as torch does with its first question about a
GPU, finds it started, or waits until it is. On a host of several GPUs that takes seconds.
"""

import ctypes
import threading
from contextlib import suppress


def start_driver(device: str) -> threading.Thread | None:
    """Start the driver in a thread, which is returned; None with `device` "cpu". Where there is no
    driver, or no GPU, nothing happens: torch will say so."""
    if device == "cpu":
        return None
    thread = threading.Thread(target=_initialise, name="CUDA driver", daemon=True)
    thread.start()
    return thread


def _initialise() -> None:
    with suppress(OSError):  # no driver
        ctypes.CDLL("libcuda.so.1").cuInit(0)
