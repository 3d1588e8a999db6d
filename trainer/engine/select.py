"""The engines by name, and the choice that `engine.kind: auto` makes."""

import importlib
import os

from trainer.config.config import Config
from trainer.device_memory import readable
from trainer.distributed.world import World
from trainer.engine.base import Engine
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.footprint import estimate
from trainer.tasks.base import Task

_ENGINES = {
    "single": ("trainer.engine.single", "SingleEngine"),
    "ddp": ("trainer.engine.ddp", "DDPEngine"),
    "peer": ("trainer.engine.peer", "PeerEngine"),
    "fsdp2": ("trainer.engine.fsdp2", "FSDP2Engine"),
    "deepspeed": ("trainer.engine.deepspeed", "DeepSpeedEngine"),
}

_STATES = 0.6
"""Share of a GPU's memory that backbone, adapters and moments may take under ddp, and under peer.
More would leave so little for activations that computing them again costs more than gathering
weights."""


def make_engine(config: Config, world: World, task: Task) -> Engine:
    """The engine that the configuration asks for, or that `auto` chooses. All ranks call it
    together."""
    with world.all_or_none():
        kind, reason = choose(config, world, task)
        if kind != "single" and "RANK" not in os.environ:
            raise UserError(
                f"engine.kind: {kind} given without a launcher; accepted: auto or single, or start "
                "with `deepspeed launch/train.py` or `torchrun launch/train.py`"
            )
    if kind == "peer" and config.engine.kind == "auto":
        from trainer.engine.peer_memory import possible

        if not possible(world):
            kind, reason = "fsdp2", f"{reason}, but they cannot share memory"
    with world.all_or_none():
        engine = engine_class(kind)(config, world)
    engine.reason = reason
    engine.meet()
    return engine


def engine_class(kind: str) -> type[Engine]:
    """The engine of this name; its library is imported only now."""
    module, name = _ENGINES[kind]
    return getattr(importlib.import_module(module), name)


def choose(config: Config, world: World, task: Task) -> tuple[str, str]:
    """(kind, why `auto` chose it): deepspeed under its launcher or with its JSON; under torchrun
    ddp where the whole backbone fits on every GPU, peer where it fits on those of every host, which
    can read each other's memory, else fsdp2; single alone."""
    if config.engine.kind == "single" and world.size > 1:
        raise UserError(
            f"engine.kind: single given with {world.size} processes; "
            "accepted: auto, ddp, peer, fsdp2, deepspeed"
        )
    if config.engine.kind != "auto":
        return config.engine.kind, ""
    if world.launcher == "deepspeed":
        return "deepspeed", "its launcher was used"
    if config.engine.config:
        if world.launcher == "none":
            raise UserError(
                "engine.config: given without a launcher; accepted: under `deepspeed "
                "launch/train.py`"
            )
        return "deepspeed", "engine.config is given"
    if world.size == 1:
        return "single", "one process"
    if world.gpu_bytes == 0:
        return "fsdp2", "no GPU"
    backbone = build(config, task, world.device)
    room, local_ranks = int(_STATES * world.gpu_bytes), min(len(ranks) for ranks in world.nodes)
    whole = estimate(backbone, config, world.size, "whole").total
    found = f"the whole backbone with adapters and moments takes {readable(whole)}, "
    if whole <= room:
        return "ddp", f"{found}at most {_STATES:.0%} of a GPU"
    found += f"more than {_STATES:.0%} of a GPU"
    if local_ranks == 1:
        return "fsdp2", f"{found}, and a host has only one"
    if not world.peers:
        return "fsdp2", f"{found}, and those of a host cannot read each other's memory"
    part = estimate(backbone, config, world.size, "blocks", local_ranks=local_ranks).total
    if part > room:
        return "fsdp2", f"{found}, and spread over those of a host still {readable(part)}"
    return "peer", f"{found}, and spread over those of a host {readable(part)}"
