"""NCCL's all-gather by a GPU's copy engines, in place of a kernel that runs beside the products.

It needs a communicator that is told to do without thread blocks, and buffers that lie at the same
place on every rank and are registered with it. torch 2.13 has the same as
`FSDPModule.set_symm_mem_for_comm`, but for one user of symmetric memory in a process only.
"""

import datetime
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from trainer.distributed.process_group import before_leaving
from trainer.distributed.world import World
from trainer.errors import first_line

_FAILURES = RuntimeError, AttributeError, TypeError
"""Of NCCL and the driver; of a torch whose interface is another."""


def possible(world: World) -> bool:
    """Whether there are several ranks, all on one host, whose GPUs reach each other's memory, and
    this NCCL can be told."""
    return (
        world.device.type == "cuda"
        and world.size > 1
        and len(world.nodes) == 1
        and world.peers
        and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")
    )


@cache
def gathering(world: World, timeout: float) -> "tuple[dist.ProcessGroup, CopyEngines] | str":
    """The communicator of all ranks (`timeout` in seconds) and its all-gather, one in a process, or
    why there is none; tried, since GPUs that could may not be allowed to. All ranks call it
    together."""
    made, problem = None, None
    try:
        group = _communicator(world.device, timeout)
        made = group, CopyEngines(group, world.device)
    except _FAILURES as error:
        problem = first_line(error)
    problems = [text for text in world.gather(problem) if text]
    if made is None or problems:
        return problems[0]
    try:
        problem = None if _gathers(*made, world) else "what was gathered is wrong"
    except _FAILURES as error:
        problem = first_line(error)
    problems = [text for text in world.gather(problem) if text]
    return problems[0] if problems else made


def _communicator(device: torch.device, timeout: float) -> dist.ProcessGroup:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options.config.cta_policy = nccl.NCCL_CTA_POLICY_ZERO
    # As for the first one: the hosts, who meet at every step, notice first. Given twice: torch
    # warns where the two differ.
    patience = options._timeout = datetime.timedelta(seconds=timeout + 60)
    group = dist.new_group(backend="nccl", pg_options=options, timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # connects
    return group


def _gathers(group: dist.ProcessGroup, gather: "CopyEngines", world: World) -> bool:
    """Whether everyone's megabyte arrives, as a block's would."""
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        everyone = gather.allocate((world.size, 2**20), dtype=torch.uint8, device=world.device)
        own = everyone[world.rank].fill_(world.rank + 1)
        gather(everyone.view(-1), own, group)
        expected = torch.arange(1, world.size + 1, dtype=torch.uint8, device=world.device)
        return torch.equal(everyone, expected.unsqueeze(1).expand_as(everyone))


class CopyEngines(AllGather):
    """`fully_shard`'s way to gather, for `FSDPModule.set_custom_all_gather`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        backend: Any = group._get_backend(device)
        self._pool = torch.cuda.MemPool(backend.mem_allocator)
        # What is allocated in it later is registered too, on all ranks alike.
        backend.register_mem_pool(self._pool, symm=True)
        # Memory that is freed later would otherwise look for a communicator that is gone.
        before_leaving(lambda: backend.deregister_mem_pool(self._pool))

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # NCCL before 2.29.7 fails to copy on the default stream (its issue 2003). What lies in
        # memory of another kind it gathers by a kernel.
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            return torch.empty(*size, dtype=dtype, device=device)
        with torch.cuda.use_mem_pool(self._pool):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
