"""This process among all of the run's: what ranks tell each other, and failing together.

Besides `process_group.py`, the engines and the checkpoint writer, the only module that calls
`torch.distributed`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import object_exchange
from trainer.distributed.failures import FailedElsewhere, exit_code


@dataclass(frozen=True)
class World:
    """This process among all of the run's."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    launcher: str = "none"
    """`deepspeed`, `torchrun` (or another that sets RANK and WORLD_SIZE), or `none`."""
    control: Any = None
    """A gloo group for plain data, where the default group is NCCL's."""
    saving: Any = None
    """A gloo group of the checkpoint writer's own, since it works in the background."""
    gpu_bytes: int = 0
    """Memory of the smallest rank's GPU; 0 on CPUs."""
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    """The ranks of every host."""
    peers: bool = True
    """Whether the ranks of every host can read each other's memory (on CPUs they can)."""
    local_group: Any = None
    """The group of this host's ranks; None for the default group, where there is one host."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        """Index of this rank's host in `nodes`."""
        return next(i for i, ranks in enumerate(self.nodes) if self.rank in ranks)

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Everyone's value, in order of rank, on every rank. For small plain data."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. It meets on the hosts: a rank that never comes shows
        here, before the others wait for it on their GPUs."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_parts_(self, flat: torch.Tensor) -> None:
        """Fill in a flat tensor of `size` equal parts, of which each rank has its own, in place."""
        dist.all_gather_into_tensor(flat, flat.view(self.size, -1)[self.rank])

    def share_(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a contiguous tensor on every rank of this host with that of rank `source`, one
        of them. Bits arrive as they are, whatever the dtype."""
        if len(self.nodes[self.node]) > 1:
            dist.broadcast(tensor.view(-1).view(torch.uint8), source, group=self.local_group)

    @contextmanager
    def all_or_none(self) -> Iterator[list[Any]]:
        """Run a stage without collectives inside; if it fails on one rank, it fails on all.

        The lowest failing rank raises its own error, the others `FailedElsewhere`, so that one
        line is printed and nobody is left waiting in a collective. What the stage puts into the
        list that it is given, one value of plain data, is then replaced by everyone's, in order
        of rank.
        """
        failure: BaseException | None = None
        told: list[Any] = []
        try:
            yield told
        except Exception as error:  # handed on below, on every rank
            failure = error
        code = None if failure is None else exit_code(failure)
        codes, values = zip(*self._gather_messages([code, told]), strict=True)
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if failed:
            if failed[0] == self.rank and failure is not None:
                raise failure
            raise FailedElsewhere(codes[failed[0]]) from failure
        told[:] = [value for values_of_rank in values for value in values_of_rank]

    def on_rank0(self, question: Callable[[], Any]) -> Any:
        """What `question` returns on rank 0, plain data, on every rank; if it fails there, it fails
        on all."""
        answer, failure = None, None
        if self.is_main:
            try:
                answer = question()
            except Exception as error:  # likewise
                failure = error
        code = None if failure is None else exit_code(failure)
        answer, code = self._broadcast_message([answer, code])
        if failure is not None:
            raise failure
        if code is not None:
            raise FailedElsewhere(code)
        return answer

    def _gather_messages(self, value: Any) -> list[Any]:
        """Everyone's, in order of rank."""
        if self.size == 1:
            return [value]

        def exchange_buffers(own: torch.Tensor) -> torch.Tensor:
            all_of_them = own.new_empty(self.size, len(own))
            dist.all_gather(list(all_of_them), own, group=self.control)
            return all_of_them

        return object_exchange.exchange(value, exchange_buffers, object_exchange.DIGEST_BYTES)

    def _broadcast_message(self, value: Any) -> Any:
        """Rank 0's."""
        if self.size == 1:
            return value

        def exchange_buffers(own: torch.Tensor) -> torch.Tensor:
            dist.broadcast(own, src=0, group=self.control)
            return own.unsqueeze(0)

        return object_exchange.exchange(value, exchange_buffers, object_exchange.MESSAGE_BYTES)[0]
