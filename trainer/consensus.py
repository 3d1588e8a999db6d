"""Decide on rank 0, broadcast, apply everywhere, verify that everyone holds the same."""

import hashlib

import torch

from adapters.method import Decision, Method
from trainer.distributed import World
from trainer.errors import RunFailed


def decide_and_apply(method: Method, step: int, world: World) -> tuple[Decision | None, bool]:
    """(what rank 0 decided before this step, whether tensors changed).

    Raises RunFailed, on every rank, where a rank's masks and gates then differ from rank 0's.
    """
    if not method.decides:
        return None, False
    decision = world.broadcast(method.decide(step) if world.is_main else None)
    if decision is None:
        return None, False
    changed = method.apply(decision)
    digests = world.gather(state_digest(method))
    strays = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    with world.together():
        if strays:
            raise RunFailed(
                f"step {step}: masks and gates of rank {', '.join(map(str, strays))} differ from "
                "rank 0's after applying the same decision; the run stops"
            )
    return decision, changed


def state_digest(method: Method) -> str:
    """Digest of every unit's mask and gates."""
    digest = hashlib.sha256()
    for name, adapter in method.adapters.items():
        digest.update(name.encode())
        for tensor in (adapter.mask, adapter.g):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
