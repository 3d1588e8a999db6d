"""Processes: who we are, the process group, and failing together.

The only module besides the engines and the checkpoint writer that touches `torch.distributed`.
"""

import datetime
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import object_exchange
from trainer.errors import EXIT_FAILED, EXIT_REQUEUE, RunFailed, UserError, first_line

_CONNECTION = "gloo|NCCL|TCPStore|pair closure|Connection (closed|reset)|Broken pipe"
"""How a collective complains that another rank is not there."""

_GRACE = 5.0
"""Seconds in which every rank that still works notices that another one does not."""


class FailedElsewhere(UserError):
    """Another rank failed and has said why; this one only leaves."""

    def __init__(self, exit_code: int):
        super().__init__("another rank failed")
        self.exit_code = exit_code


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


def start(device: str = "auto", timeout: float = 600.0) -> World:
    """Join the process group that the launcher described in the environment, if it did."""
    use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu and not torch.cuda.is_available():
        raise UserError("engine.device: 'cuda' given, but no GPU is visible; accepted: auto, cpu")
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} processes on a host with {torch.cuda.device_count()} GPUs; "
            "accepted: one process per GPU, or engine.device=cpu"
        )
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(device=place, gpu_bytes=_memory(place))
    local_group = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "OMP_NUM_THREADS" not in os.environ:
        # Threads of several processes on the same cores wait for each other, by the millisecond.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_group))
    if local_group == int(os.environ["WORLD_SIZE"]) and Path("/sys/class/net/lo").exists():
        for library in ("GLOO", "NCCL"):  # one host: nobody outside needs to hear of it
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    patience = datetime.timedelta(seconds=timeout)
    # NCCL ends the process without a word: the hosts, who meet at every step, notice first.
    longer = patience + datetime.timedelta(seconds=60 if use_gpu else 0)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            timeout=longer,
            device_id=place if use_gpu else None,
            **_meeting_point(patience),
        )
    except RuntimeError as error:
        raise RunFailed(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not find each other at "
            f"{_address()} within {timeout:g} s, engine.timeout ({first_line(error)})"
        ) from error
    met: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(met, (socket.gethostname(), _memory(place), _reads_others(place)))
    nodes = _nodes([host for host, *_ in met])
    groups = [dist.new_group(list(r), timeout=longer) for r in nodes] if len(nodes) > 1 else [None]
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        device=place,
        launcher="deepspeed" if "CROSS_RANK" in os.environ else "torchrun",
        control=dist.new_group(backend="gloo", timeout=patience) if use_gpu else None,
        saving=dist.new_group(backend="gloo", timeout=patience),
        gpu_bytes=min(memory for _, memory, _ in met),
        peers=all(reads for *_, reads in met),
        nodes=nodes,
        local_group=next(
            group for group, ranks in zip(groups, nodes, strict=True) if dist.get_rank() in ranks
        ),
    )


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def _reads_others(device: torch.device) -> bool:
    """Whether this GPU can read the memory of every other one of its host."""
    others = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    return all(
        torch.cuda.can_device_access_peer(device, other)
        for other in others
        if other != device.index
    )


def _nodes(hosts: list[str]) -> tuple[tuple[int, ...], ...]:
    """The ranks of every host, hosts in order of their lowest rank; `hosts`: each rank's."""
    return tuple(
        tuple(rank for rank, name in enumerate(hosts) if name == host)
        for host in dict.fromkeys(hosts)
    )


def _meeting_point(patience: datetime.timedelta) -> dict[str, Any]:
    """How the processes find each other: as the launcher says. Where rank 0 keeps the store and all
    come by the loopback interface, it listens there alone; torch's own listens to everyone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher keeps it
        return {}
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not socket.gethostbyname(host).startswith("127."):
            return {}
        listener = socket.create_server((host, port)) if os.environ["RANK"] == "0" else None
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT: {_address()}: {error}; accepted: rank 0's host and a port "
            "of it that is free"
        ) from error
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    descriptor = None if listener is None else listener.detach()
    store = dist.TCPStore(host, port, size, rank == 0, patience, master_listen_fd=descriptor)
    return {"store": store, "rank": rank, "world_size": size}


def _address() -> str:
    return ":".join(os.environ.get(f"MASTER_{part}", "") for part in ("ADDR", "PORT"))


_before_leaving: list[Callable[[], None]] = []


def before_leaving(action: Callable[[], None]) -> None:
    """Have `action` done while this process is still in its group, by `stop`."""
    _before_leaving.append(action)


def stop() -> None:
    """Leave the process group once everyone is done."""
    if dist.is_initialized():
        dist.barrier()
        while _before_leaving:
            _before_leaving.pop()()
        dist.destroy_process_group()


def exit_code(error: BaseException) -> int:
    """The code in which a failure ends the process."""
    return error.exit_code if isinstance(error, UserError) else EXIT_FAILED


def _missing() -> tuple[list[int], bool]:
    """(ranks that do not notice within seconds that the run has broken off: those that are gone or
    stalled; whether this rank is the lowest of the others)."""
    rank, others = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    noticed: set[int] = set()
    answers = threading.Event()

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # the store's process has left
            store.set(f"noticed/{rank}", "")
            while noticed != others:
                noticed.update(r for r in others - noticed if store.check([f"noticed/{r}"]))
                answers.set()
                time.sleep(0.1)

    # In the background: where rank 0 keeps the store and is itself stalled, it answers nobody.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_GRACE)
    missing = others - noticed if answers.is_set() else {0}
    return sorted(missing), rank == min({rank, *others} - missing)


def report_lost(reason: str) -> None:
    """Say once which ranks are gone or stand still; where none is, each says what it waited for."""
    missing, spokesman = _missing()
    rank = dist.get_rank()
    who = f" [rank {rank}]" if rank > 0 else ""
    lost = f"rank {', '.join(map(str, missing))}" if missing else "another rank, though all answer"
    if spokesman or not missing:
        print(f"error:{who} lost {lost} ({reason})", file=sys.stderr, flush=True)


def report(error: BaseException) -> None:
    """Print a failure where a person sees it: one line, or a traceback where it is our mistake."""
    if isinstance(error, FailedElsewhere):
        return
    rank = int(os.environ.get("RANK", "0"))
    who = f" [rank {rank}]" if rank > 0 else ""
    if isinstance(error, UserError):
        kind = "stopped" if error.exit_code == EXIT_REQUEUE else "error"
        print(f"{kind}:{who} {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return
    connected = isinstance(error, RuntimeError) and dist.is_initialized()
    if connected and re.search(_CONNECTION, str(error)):
        report_lost(re.sub(r"\[\S+?\.(cc|cpp|h):\d+\] ", "", first_line(error)))
        return
    traceback.print_exception(error)
    print(f"error:{who} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
