"""Runs many cases in one pair of processes, since starting processes costs more than most cases.

    torchrun --nproc_per_node 2 tests/distributed/worker.py cases.json results [cpu|cuda]

Each case names a function below and its arguments; what it returns on each rank (or the error it
ended in) is written to results/<rank>.json.
"""

import ctypes
import gc
import hashlib
import json
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from adapters.linear import AdaptedLinear
from adapters.units import transformer_blocks
from trainer import distributed
from trainer.config import parse_config
from trainer.distributed import World
from trainer.loop import accumulate, make_loader
from trainer.run import run
from trainer.session import open_session

MIB = 2**20


def train(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A whole run, as launch/train.py does it."""
    run(parse_config(config), world)
    return {}


def train_on_a_full_disk(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A run whose second rank may write only small files, by a limit of the operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        return train(world, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def shard(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes that the backbone takes: between steps, and between forward and backward."""
    settle()
    before = resident()
    session = open_session(parse_config(config), world)
    loader = make_loader(session, world)
    session.optimizer.zero_grad()
    settle()
    loaded = resident()
    result: dict[str, Any] = {
        "kind": session.engine.kind,
        "local_bytes": session.engine.local_bytes(session.model),
        "resident_after_loading": loaded - before,
    }
    step = next(iter(loader))
    accumulate(session, step, 0)  # the first pass allocates what stays: buffers, traces
    settle()
    _, batch = step.micro_batches[0]
    held = []
    for _ in range(3):  # what is really held shows every time; the least is free of noise
        settle()
        rested = resident()
        loss, _ = session.task.loss(session.model, batch)
        settle()
        after_forward = resident() - rested
        loss.backward()
        del loss
        settle()
        held.append((after_forward, resident() - rested))
    result["held_after_forward"], result["held_after_backward"] = map(min, zip(*held, strict=True))
    return result


def gathered(world: World, config: dict[str, Any]) -> dict[str, str]:
    """Digest of every quantised matrix, byte by byte, as it is while its block is whole."""
    session = open_session(parse_config(config), world)
    digests = {}
    for path, block in transformer_blocks(session.model):
        with session.engine.unsharded(block):
            for name, host in block.named_modules():
                if isinstance(host, AdaptedLinear):
                    data = host.weight.detach().cpu().clone().view(torch.uint8)
                    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
                    digests[f"{path}.{name}"] = digest
    return digests


def settle() -> None:
    """Give freed memory back to the system, so that resident memory says what is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Anonymous resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


CASES = {
    "train": train,
    "train_on_a_full_disk": train_on_a_full_disk,
    "shard": shard,
    "gathered": gathered,
}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = distributed.start(sys.argv[3] if len(sys.argv) > 3 else "cpu", 120.0)
    results = {}
    for name, (function, argument) in cases.items():
        started = time.perf_counter()
        try:
            result = {"ok": CASES[function](world, argument)}
        except Exception as error:
            result = {
                "error": type(error).__name__,
                "message": str(error),
                "exit_code": distributed.exit_code(error),
                "traceback": traceback.format_exc(),
            }
        results[name] = result | {"seconds": time.perf_counter() - started}
        (out / f"{world.rank}.json").write_text(json.dumps(results))
        gc.collect()
    distributed.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
