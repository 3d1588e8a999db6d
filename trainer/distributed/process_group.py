"""Joins and leaves the process group of the ranks that the launcher started."""

import datetime
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.attempt import agree
from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError, first_line


def start(device: str = "auto", timeout: float = 600.0) -> World:
    """Join the process group that the launcher's environment variables describe, if any."""
    use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu and not torch.cuda.is_available():
        raise UserError("engine.device: 'cuda' given, but no GPU is visible; accepted: auto, cpu")
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} processes on a node with {torch.cuda.device_count()} GPUs; "
            "accepted: one process per GPU, or engine.device=cpu"
        )
    own_device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(own_device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(device=own_device, gpu_bytes=_memory(own_device))
    configure_rank()
    gloo_timeout = datetime.timedelta(seconds=timeout)
    # NCCL aborts the process without a message: gloo, which is used at every step, times out first.
    default_timeout = gloo_timeout + datetime.timedelta(seconds=60 if use_gpu else 0)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            timeout=default_timeout,
            device_id=own_device if use_gpu else None,
            **_rendezvous(gloo_timeout),
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise _unusable(OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))) from error
        raise RunFailed(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not find each other at "
            f"{_address()} within {timeout:g} s, engine.timeout ({first_line(error)})"
        ) from error
    own = socket.gethostname(), _memory(own_device), _has_peer_access(own_device)
    gathered = World(rank=dist.get_rank(), size=dist.get_world_size()).gather(own)
    nodes = _nodes([host for host, *_ in gathered])
    groups = (
        [dist.new_group(list(r), timeout=default_timeout) for r in nodes]
        if len(nodes) > 1
        else [None]
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        device=own_device,
        launcher="deepspeed" if "CROSS_RANK" in os.environ else "torchrun",
        control=dist.new_group(backend="gloo", timeout=gloo_timeout) if use_gpu else None,
        saving=dist.new_group(backend="gloo", timeout=gloo_timeout),
        gpu_bytes=min(memory for _, memory, _ in gathered),
        peers=all(has_access for *_, has_access in gathered),
        nodes=nodes,
        local_group=next(
            group for group, ranks in zip(groups, nodes, strict=True) if dist.get_rank() in ranks
        ),
    )


def configure_rank() -> None:
    """Process-wide settings of a rank: torch's threads, gloo's and NCCL's network interface. Call
    before the process group is created."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "OMP_NUM_THREADS" not in os.environ:
        # Oversubscribed cores stall the threads of a process for milliseconds.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if local_ranks == int(os.environ["WORLD_SIZE"]) and Path("/sys/class/net/lo").exists():
        for library in ("GLOO", "NCCL"):  # a single node
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")


def _memory(device: torch.device) -> int:
    """Bytes of GPU memory; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def _has_peer_access(device: torch.device) -> bool:
    """Whether this GPU has peer access to every other one of its node."""
    others = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    return all(
        torch.cuda.can_device_access_peer(device, other)
        for other in others
        if other != device.index
    )


def _nodes(hosts: list[str]) -> tuple[tuple[int, ...], ...]:
    """Ranks of each node, nodes in order of their lowest rank; `hosts`: hostname of each rank."""
    return tuple(
        tuple(rank for rank, name in enumerate(hosts) if name == host)
        for host in dict.fromkeys(hosts)
    )


def _rendezvous(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` for the rendezvous; {} for torch's default.

    Under torchrun: its agent's store, with keys of this attempt only. If MASTER_ADDR is a loopback
    address, rank 0's store listens on loopback only; torch's default store listens on all
    interfaces.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher holds the store
            agents = dist.TCPStore(host, port, size, False, timeout, wait_for_workers=False)
            shared = dist.PrefixStore("rankcast", agents)
            store = dist.PrefixStore(agree(shared, rank, size, timeout), shared)
            return {"store": store, "rank": rank, "world_size": size}
        if not socket.gethostbyname(host).startswith("127."):
            return {}
        listener = socket.create_server((host, port)) if os.environ["RANK"] == "0" else None
    except (OSError, KeyError, ValueError) as error:
        raise _unusable(error) from error
    descriptor = None if listener is None else listener.detach()
    own = dist.TCPStore(host, port, size, rank == 0, timeout, master_listen_fd=descriptor)
    return {"store": own, "rank": rank, "world_size": size}


def _unusable(error: Exception) -> UserError:
    return UserError(
        f"MASTER_ADDR:MASTER_PORT: {_address()}: {error}; accepted: rank 0's host and a free port "
        "on it, as --master_port 29501 gives it to torchrun or deepspeed"
    )


def _address() -> str:
    return ":".join(os.environ.get(f"MASTER_{part}", "") for part in ("ADDR", "PORT"))


_before_leaving: list[Callable[[], None]] = []


def before_leaving(action: Callable[[], None]) -> None:
    """Register `action` to run in `stop`, before the process group is destroyed."""
    _before_leaving.append(action)


def stop() -> None:
    """Barrier, run the `before_leaving` actions, destroy the process group. Collective."""
    if dist.is_initialized():
        dist.barrier()
        while _before_leaving:
            _before_leaving.pop()()
        dist.destroy_process_group()
