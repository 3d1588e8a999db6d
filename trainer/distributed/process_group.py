"""Join the processes that the launcher started, and leave them."""

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError, first_line


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
    configure_rank()
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


def configure_rank() -> None:
    """Set what is global to one of several processes: torch's threads, gloo's and NCCL's network
    interface. Before the group is made."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "OMP_NUM_THREADS" not in os.environ:
        # Threads of several processes on the same cores wait for each other, by the millisecond.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if local_ranks == int(os.environ["WORLD_SIZE"]) and Path("/sys/class/net/lo").exists():
        for library in ("GLOO", "NCCL"):  # one host: nobody outside needs to hear of it
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")


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
