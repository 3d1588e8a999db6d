"""Decide on rank 0, broadcast, apply on all ranks, compare digests of masks and gates."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from adapters.decision import Decision
from adapters.methods.base import Method
from trainer.decisions.replay import Replay
from trainer.distributed.world import World
from trainer.errors import RunFailed


def decide_and_apply(
    method: Method, step: int, world: World, replay: Replay | None = None
) -> tuple[Decision | None, bool]:
    """(rank 0's decision for this step or None, whether tensors were added, removed or resized).
    Collective.

    Raises RunFailed, on every rank, where a rank's masks and gates then differ from rank 0's.
    """
    if not method.due(step):
        return None, False
    names = list(method.decided)
    message = world.on_rank0(lambda: without_names(_decide(method, step, replay), names))
    if message is None:
        return None, False
    with world.all_or_none() as digests:
        decision = Decision.from_plain(with_names(message, names))
        changed = method.apply(decision)
        digests.append(state_digest(method))
    differ = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differ:  # the same on every rank
        with world.all_or_none():
            raise RunFailed(
                f"step {step}: masks and gates of rank {', '.join(map(str, differ))} differ from "
                "rank 0's after applying the same decision; the run stops"
            )
    return decision, changed


def _decide(method: Method, step: int, replay: Replay | None) -> dict[str, Any] | None:
    """The decision as plain data."""
    if replay is not None:
        decision = replay.decide(step)
    else:
        try:
            decision = method.decide(step)
        except ValueError as error:
            raise RunFailed(f"step {step}: {error}") from error
    return None if decision is None else decision.to_plain()


def without_names(plain: Mapping[str, Any] | None, names: list[str]) -> list[Any] | None:
    """A decision as the message [(key, by_name, value)]: a value by name (`by_name`) is sent as a
    list in the order of `names`, which all ranks know and which would be most of the message."""
    if plain is None:
        return None
    message = []
    for key, value in plain.items():
        by_name = isinstance(value, dict) and list(value) == names
        message.append((key, by_name, list(value.values()) if by_name else value))
    return message


def with_names(message: list[Any], names: list[str]) -> dict[str, Any]:
    """The decision of a message; inverse of `without_names`."""
    return {
        key: dict(zip(names, value, strict=True)) if by_name else value
        for key, by_name, value in message
    }


def state_digest(method: Method) -> str:
    """SHA-256 of every unit's name, mask and gates."""
    digest = hashlib.sha256("\n".join(method.adapters).encode())
    if method.adapters:
        table = method.adapters.mask_table
        parts = table.masks, table.gates
        state = torch.cat([part.view(torch.uint8) for part in parts])  # one transfer
        digest.update(state.cpu().numpy().tobytes())
    return digest.hexdigest()
