"""What a process holds of its device's memory, and has held: torch's counters and the system's."""

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import torch

GIB = 2**30


def readable(nbytes: int) -> str:
    """A number of bytes for a person: MiB below a tenth of a GiB, else GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"


_outside = 0


def count_outside(nbytes: int) -> None:
    """What a process takes of its GPU outside torch's allocator, or (below 0) gives back."""
    global _outside
    _outside += nbytes


def allowance(device: torch.device, fraction: float) -> int:
    """Most bytes that this process may hold for `fraction` of its GPU to be taken: what others hold
    counts too."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + _outside
    return int(fraction * total) - (total - free - own)


def held_bytes(device: torch.device) -> int:
    """What this process holds now: the GPU's tensors, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _outside
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def release(device: torch.device) -> None:
    """Collect what is unreachable, and hand freed memory back to the GPU and to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Ask the C library to give freed pages back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """Most that this process has held: the GPU's tensors, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _outside
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB
