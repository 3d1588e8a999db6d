"""`World`: a rank's place among the others, collectives on small objects, collective failure.

Besides it only `process_group.py`, `failures.py`, the engines and the checkpoint writer call
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
from trainer.distributed.patience import Patience
from trainer.errors import UserError, first_line


@dataclass(frozen=True)
class World:
    """This rank, the layout of all ranks, and their process groups."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    launcher: str = "none"
    """`deepspeed`, `torchrun` (or another that sets RANK and WORLD_SIZE), or `none`."""
    control: Any = None
    """gloo group for objects, where the default group is NCCL's."""
    saving: Any = None
    """gloo group of the checkpoint writer, which runs in a background thread."""
    gpu_bytes: int = 0
    """Memory of the smallest rank's GPU; 0 on CPUs."""
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    """Ranks of each node."""
    peers: bool = True
    """Whether the GPUs of each node have access to each other's memory (True on CPUs)."""
    local_group: Any = None
    """Process group of this node's ranks; None, the default group, on a single node."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        """Index of this rank's node in `nodes`."""
        return next(i for i, ranks in enumerate(self.nodes) if self.rank in ranks)

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """All-gather plain data (`object_exchange`): that of all ranks, in rank order."""
        return self._gather_messages(value, group)

    def broadcast(self, value: Any) -> Any:
        """Broadcast plain data from rank 0."""
        return self._broadcast_message(value)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Over gloo: a lost rank shows here, before the others
        wait for it on their GPUs."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) a tensor in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_parts_(self, flat: torch.Tensor) -> None:
        """All-gather a flat tensor of `size` equal shards in place; each rank provides its own."""
        dist.all_gather_into_tensor(flat, flat.view(self.size, -1)[self.rank])

    def share_(self, tensor: torch.Tensor, source: int) -> None:
        """Broadcast a contiguous tensor in place from rank `source` to the ranks of its node;
        bit-exact in any dtype."""
        if len(self.nodes[self.node]) > 1:
            dist.broadcast(tensor.view(-1).view(torch.uint8), source, group=self.local_group)

    def patience(self, stop: Callable[[], None] = lambda: None) -> Patience:
        """For a stage (`all_or_none`) that may take longer than `engine.timeout`, begun by all
        ranks; `stop` raises where this rank is asked to stop."""
        return Patience(self.size, self.saving, stop)

    @contextmanager
    def all_or_none(self, patience: Patience | None = None) -> Iterator[list[Any]]:
        """Run a stage without collectives inside; if it fails on one rank, it fails on all.
        Collective; without `patience` ranks wait for each other `engine.timeout` long at most.

        The lowest failing rank raises its own error, the others `FailedElsewhere`, so that one
        line is printed on every host and no rank hangs in a collective. A value (plain data) that
        the stage appends to the yielded list is all-gathered: the list then holds those of all
        ranks, in rank order.
        """
        failure: BaseException | None = None
        shared: list[Any] = []
        try:
            yield shared
            if patience is not None:
                patience.wait()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # re-raised below, on every rank; also a library's panic
            failure = error
            if patience is not None:
                patience.fail()
        is_own = failure is not None and not isinstance(failure, FailedElsewhere)
        report = _report(failure) if failure is not None and is_own else None
        reports, values = zip(*self._gather_messages([report, shared]), strict=True)
        failed = [rank for rank, report in enumerate(reports) if report is not None]
        if failed:
            if failed[0] == self.rank and failure is not None:
                raise failure
            raise self._elsewhere(failed[0], reports[failed[0]]) from failure
        shared[:] = [value for values_of_rank in values for value in values_of_rank]

    def on_rank0(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0 and broadcast its result (plain data); if it fails, it fails on
        all ranks. Collective."""
        result, failure = None, None
        if self.is_main:
            try:
                result = function()
            except Exception as error:  # re-raised below
                failure = error
        report = None if failure is None else _report(failure)
        result, report = self._broadcast_message([result, report])
        if failure is not None:
            raise failure
        if report is not None:
            raise self._elsewhere(0, report)
        return result

    def _elsewhere(self, rank: int, report: tuple[int, str]) -> FailedElsewhere:
        """What this rank raises where `rank` failed: the first rank of another host says why."""
        code, text = report
        ranks = self.nodes[self.node]
        speaks = rank not in ranks and self.rank == ranks[0]
        return FailedElsewhere(code, f"rank {rank}, on another host: {text}" if speaks else "")

    def _gather_messages(self, value: Any, group: Any = None) -> list[Any]:
        """All-gather a message; those of all ranks, in rank order."""
        if self.size == 1:
            return [value]

        def exchange_buffers(buffer: torch.Tensor) -> torch.Tensor:
            gathered = buffer.new_empty(self.size, len(buffer))
            dist.all_gather(list(gathered), buffer, group=group or self.control)
            return gathered

        return object_exchange.exchange(value, exchange_buffers, object_exchange.DIGEST_BYTES)

    def _broadcast_message(self, value: Any) -> Any:
        """Broadcast rank 0's message."""
        if self.size == 1:
            return value

        def exchange_buffers(buffer: torch.Tensor) -> torch.Tensor:
            dist.broadcast(buffer, src=0, group=self.control)
            return buffer.unsqueeze(0)

        return object_exchange.exchange(value, exchange_buffers, object_exchange.MESSAGE_BYTES)[0]


def _report(failure: BaseException) -> tuple[int, str]:
    """(exit code, first line) of a failure, for the other ranks."""
    kind = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
    # Names of files may hold bytes that are no text, which no message takes.
    line = first_line(failure).encode(errors="backslashreplace").decode()
    return exit_code(failure), kind + line
