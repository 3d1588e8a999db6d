"""NCCL all-gather on the GPU's copy engines, which leaves the SMs to the GEMMs.

It needs a communicator with the zero-CTA policy and buffers registered with it as symmetric memory.
torch 2.13 offers this as `FSDPModule.set_symm_mem_for_comm`, but for one user of symmetric memory
per process only.
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
"""Raised by NCCL and the driver, or by a version of torch with another interface."""


def possible(world: World) -> bool:
    """Whether there are several ranks, all on one host with peer access, and NCCL has the zero-CTA
    policy."""
    return (
        world.device.type == "cuda"
        and world.size > 1
        and len(world.nodes) == 1
        and world.peers
        and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")
    )


@cache
def gathering(world: World, timeout: float) -> "tuple[dist.ProcessGroup, CopyEngines] | str":
    """The communicator of all ranks (`timeout` in seconds) and its all-gather; or, as a string, why
    there is none. Verified by a trial gather, since permissions may forbid what the hardware can
    do. Cached per process. Collective."""
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
        problem = None if _gathers(*made, world) else "a trial gather gave wrong bytes"
    except _FAILURES as error:
        problem = first_line(error)
    problems = [text for text in world.gather(problem) if text]
    return problems[0] if problems else made


def _communicator(device: torch.device, timeout: float) -> dist.ProcessGroup:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options.config.cta_policy = nccl.NCCL_CTA_POLICY_ZERO
    # Longer than the control group's timeout, so that the latter reports first. Passed twice, since
    # torch warns where the two differ.
    patience = options._timeout = datetime.timedelta(seconds=timeout + 60)
    group = dist.new_group(backend="nccl", pg_options=options, timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # creates the connections
    return group


def _gathers(group: dist.ProcessGroup, gather: "CopyEngines", world: World) -> bool:
    """Whether a trial gather of 1 MiB per rank arrives intact."""
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        everyone = gather.allocate((world.size, 2**20), dtype=torch.uint8, device=world.device)
        own = everyone[world.rank].fill_(world.rank + 1)
        gather(everyone.view(-1), own, group)
        expected = torch.arange(1, world.size + 1, dtype=torch.uint8, device=world.device)
        return torch.equal(everyone, expected.unsqueeze(1).expand_as(everyone))


class CopyEngines(AllGather):
    """The all-gather and its allocator, for `FSDPModule.set_custom_all_gather`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        backend: Any = group._get_backend(device)
        self._pool = torch.cuda.MemPool(backend.mem_allocator)
        # Registers later allocations in the pool too, on all ranks alike.
        backend.register_mem_pool(self._pool, symm=True)
        # Otherwise memory freed at exit refers to a destroyed communicator.
        before_leaving(lambda: backend.deregister_mem_pool(self._pool))

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # NCCL before 2.29.7 fails to copy on the default stream (NCCL issue 2003). Unregistered
        # buffers are gathered by a kernel.
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
