"""Memory of a rank that the other ranks of its host read without asking it.

On GPUs it is mapped into each other's address space (torch's symmetric memory): a copy of it goes
through the copy engines and NVLink, without a kernel and without the other GPU's doing. On CPUs it
is a mapped file.
"""

import contextlib
import os
import tempfile
import weakref

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from trainer.device_memory import count_outside
from trainer.distributed.world import World
from trainer.errors import RunFailed, first_line

# Nothing here needs it, and it is what fails most.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def possible(world: World) -> bool:
    """Whether the ranks of every host can open windows: tried, since hardware that could may not be
    allowed to. All ranks call it together."""
    try:
        open_window(4096, world)
    except RunFailed:
        return False
    return True


def open_window(nbytes: int, world: World) -> list[Tensor]:
    """As many bytes on every rank of this host, in order of rank. A rank writes to its own only and
    before all of them meet; after that they are read. All ranks of a run call it together; it fails
    on all where it fails on one."""
    if world.device.type == "cpu":
        return _files(nbytes, world)
    parts, failure = [], None
    try:
        parts = _of_gpus(nbytes, world)
    except RuntimeError as error:
        failure = error
    problems = [text for text in world.gather(failure and first_line(failure)) if text]
    if problems:
        raise RunFailed(
            f"engine.kind: peer: the ranks of a host cannot share memory ({problems[0]}); "
            "accepted: fsdp2 or deepspeed"
        ) from failure
    return parts


def _files(nbytes: int, world: World) -> list[Tensor]:
    with contextlib.ExitStack() as stack:
        with world.all_or_none() as names:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="rankcast-"))
            os.truncate(file.name, nbytes)
            names.append(file.name)
        with world.all_or_none():  # nobody removes a file that others are still to open
            return [
                torch.from_file(names[rank], shared=True, size=nbytes, dtype=torch.uint8)
                for rank in world.nodes[world.node]
            ]
    raise AssertionError


def _of_gpus(nbytes: int, world: World) -> list[Tensor]:
    local_ranks = world.nodes[world.node]
    if len(local_ranks) == 1:
        return [torch.empty(nbytes, dtype=torch.uint8, device=world.device)]
    group = world.local_group or dist.group.WORLD
    assert group is not None
    before = torch.cuda.memory_allocated(world.device)
    own = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=world.device)
    # Some versions of torch take it from their allocator, which then counts it.
    outside = nbytes - (torch.cuda.memory_allocated(world.device) - before)
    window = symmetric_memory.rendezvous(own, group.group_name)
    # Before there was the first, windows began where their allocation does.
    read = getattr(window, "get_remote_tensor", window.get_buffer)
    parts = [
        # Through one's own window nothing can be written.
        own if rank == world.rank else read(index, (nbytes,), torch.uint8)
        for index, rank in enumerate(local_ranks)
    ]
    count_outside(outside)
    weakref.finalize(own, count_outside, -outside)
    return parts
