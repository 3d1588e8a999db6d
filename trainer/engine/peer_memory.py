"""Memory that the ranks of a host can read from each other.

On GPUs it is torch's symmetric memory, mapped into every rank's address space: a read is a copy by
the copy engines over NVLink, without a kernel and without work on the other GPU. On CPUs it is a
memory-mapped file.
"""

import contextlib
import os
import tempfile
import weakref

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from trainer.config.engines import AUTO
from trainer.device_memory import count_outside
from trainer.distributed.world import World
from trainer.errors import RunFailed, first_line

# Multicast is not needed, and its setup is what fails most often.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def possible(world: World) -> bool:
    """Whether the ranks of every host can map each other's memory. Verified by a trial, since
    permissions may forbid what the hardware can do. Collective."""
    try:
        open_peer_memory(4096, world)
    except RunFailed:
        return False
    return True


def open_peer_memory(nbytes: int, world: World) -> list[Tensor]:
    """Tensors of `nbytes`, one per rank of this host in order of rank. A rank may write only its
    own, and before a barrier; after it all may be read. Collective. Raises RunFailed on all ranks
    where one fails."""
    if world.device.type == "cpu":
        return _files(nbytes, world)
    tensors, failure = [], None
    try:
        tensors = _of_gpus(nbytes, world)
    except RuntimeError as error:
        failure = error
    problems = [text for text in world.gather(failure and first_line(failure)) if text]
    if problems:
        raise RunFailed(
            f"engine.kind: peer: the ranks of a host cannot share memory ({problems[0]}); "
            f"accepted: auto or {AUTO['split']}"
        ) from failure
    return tensors


def _files(nbytes: int, world: World) -> list[Tensor]:
    with contextlib.ExitStack() as stack:
        with world.all_or_none() as names:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="rankcast-"))
            os.truncate(file.name, nbytes)
            names.append(file.name)
        with world.all_or_none():  # the files exist until all ranks have mapped them
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
    # Whether torch's allocator counts this memory depends on the version of torch.
    outside = nbytes - (torch.cuda.memory_allocated(world.device) - before)
    handle = symmetric_memory.rendezvous(own, group.group_name)
    # Older versions have get_buffer only, whose offset is the allocation's.
    read = getattr(handle, "get_remote_tensor", handle.get_buffer)
    tensors = [
        # A rank's own mapping is read-only: use the allocation itself.
        own if rank == world.rank else read(index, (nbytes,), torch.uint8)
        for index, rank in enumerate(local_ranks)
    ]
    count_outside(outside)
    weakref.finalize(own, count_outside, -outside)
    return tensors
