"""Decide on rank 0, broadcast, apply everywhere, verify that everyone holds the same."""

import hashlib

import torch

from adapters.method import Decision, Method
from trainer.allocation import Replay
from trainer.distributed import World
from trainer.errors import RunFailed


def decide_and_apply(
    method: Method, step: int, world: World, replay: Replay | None = None
) -> tuple[Decision | None, bool]:
    """(what rank 0 decided before this step, whether tensors changed).

    Raises RunFailed, on every rank, where a rank's masks and gates then differ from rank 0's.
    """
    if not method.due(step):
        return None, False
    decision = None
    with world.together():
        if world.is_main:
            decision = replay.decide(step) if replay is not None else _decide(method, step)
    decision = world.broadcast(decision)
    if decision is None:
        return None, False
    with world.together():
        changed = method.apply(decision)
    digests = world.gather(state_digest(method))
    strays = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if strays:  # every rank has seen the same digests
        with world.together():
            raise RunFailed(
                f"step {step}: masks and gates of rank {', '.join(map(str, strays))} differ from "
                "rank 0's after applying the same decision; the run stops"
            )
    return decision, changed


def _decide(method: Method, step: int) -> Decision | None:
    try:
        return method.decide(step)
    except ValueError as error:
        raise RunFailed(f"step {step}: {error}") from error


def state_digest(method: Method) -> str:
    """Digest of every unit's name, mask and gates."""
    adapters = method.adapters
    digest = hashlib.sha256("\n".join(adapters).encode())
    if adapters:
        masks = torch.cat([adapter.mask for adapter in adapters.values()])
        gates = torch.cat([adapter.g.detach() for adapter in adapters.values()])
        for tensor in (masks, gates):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
