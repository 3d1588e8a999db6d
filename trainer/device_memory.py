"""A process's current and peak memory on its device, from torch's and the system's counters."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

GIB = 2**30


def readable(nbytes: int) -> str:
    """A number of bytes as text: in MiB below 0.1 GiB, else in GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"


_outside = 0


def count_outside(nbytes: int) -> None:
    """Count GPU memory allocated outside torch's allocator, or (negative) freed."""
    global _outside
    _outside += nbytes


def allowance(device: torch.device, fraction: float) -> int:
    """Bytes that this process may hold so that `fraction` of its GPU is in use, other processes'
    memory included."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + _outside
    return int(fraction * total) - (total - free - own)


def held_bytes(device: torch.device) -> int:
    """Bytes now held by this process: tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _outside
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def release(device: torch.device) -> None:
    """Collect garbage, and return cached memory to the GPU and to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


_had_run = False


@contextmanager
def modules_set_aside() -> Iterator[None]:
    """Context in which collecting garbage, as is done a dozen times until the first step, does not
    go through what was there before: a million objects of the libraries. What an earlier run of
    this process left is collected before. Where the process has set aside something already
    (`set_aside`), that is what is passed over, until the run's steps have ended."""
    global _had_run
    is_done = gc.get_freeze_count() > 0
    if not is_done:
        if _had_run:
            gc.collect()
        gc.freeze()
    _had_run = True
    try:
        yield
    finally:
        if not is_done:
            gc.unfreeze()


def set_aside() -> None:
    """Collect garbage; no later collection goes through what is left. Between the runs of a process
    that makes many: what a run leaves behind is collected, what it imported is passed over."""
    gc.collect()
    gc.freeze()


def trim() -> None:
    """Ask the C library to return freed pages to the system."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


_peak_before = 0


def begin_peak(device: torch.device) -> None:
    """On a GPU, measure the peak of what follows by itself (`peak_of_phase`)."""
    global _peak_before
    if device.type == "cuda":
        _peak_before = max(_peak_before, torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)


def forget_peak(device: torch.device) -> None:
    """Begin a run in a process that has made others: on a GPU its peak is measured anew."""
    global _peak_before
    _peak_before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of_phase(device: torch.device) -> int:
    """Peak bytes since `begin_peak`; on a CPU, whose counter is not reset, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _outside
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Peak bytes held by this process: tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return max(_peak_before, torch.cuda.max_memory_allocated(device)) + _outside
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB
