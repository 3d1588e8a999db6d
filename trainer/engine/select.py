"""Make a run's engine: the configured one, or the choice of `engine.kind: auto`."""

import importlib
import os

import torch

from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.config.engines import AUTO, ENGINES, engines_that_train
from trainer.device_memory import readable
from trainer.distributed.world import World
from trainer.engine.base import Engine
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.footprint import estimate
from trainer.tasks.base import Task

_STATES = 0.6
"""Share of a GPU's memory that backbone, adapters and moments may take under ddp and peer. More
leaves so little for activations that recomputing them costs more than gathering weights."""


def engine_class(kind: str, trains: str = "adapters") -> type[Engine]:
    """The engine class registered as `kind`, for methods that train this; its module is imported on
    this call."""
    entry = ENGINES[kind]
    path = entry.full if trains == "backbone" and entry.full else entry.engine
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def make_engine(config: Config, world: World, task: Task) -> Engine:
    """The engine that the configuration names, or that `auto` chooses. Collective. Raises UserError
    where it cannot run in this world."""
    with world.all_or_none():
        kind, reason = choose(config, world, task)
        if not ENGINES[kind].one_process and "RANK" not in os.environ:
            raise UserError(
                f"engine.kind: {kind} given without a launcher; accepted: auto or "
                f"{_those_for(one_process=True)}, or start with `rankcast train --processes N`, "
                "`deepspeed launch/train.py` or `torchrun launch/train.py`"
            )
    with world.all_or_none():
        _check(config, kind, world)
    if config.engine.kind == "auto":
        obstacle = engine_class(kind).obstacle(world)
        if obstacle is not None:
            kind, reason = AUTO["split"], f"{reason}, but {obstacle}"
    with world.all_or_none():
        engine = engine_class(kind, config.method.trains)(config, world)
    engine.reason = reason
    engine.meet()
    return engine


def _check(config: Config, kind: str, world: World) -> None:
    """Raises UserError where the method cannot train under the engine."""
    method = config.method
    if method.trains not in ENGINES[kind].trains:
        raise UserError(
            f"engine.kind: {kind} chosen with method.kind={method.kind}; accepted: "
            f"{engines_that_train(method.trains)}"
        )
    if method.trains != "backbone":
        return
    dtype = compute_dtype(config.model, world.device)
    if engine_class(kind).spread == "whole" and dtype != torch.float32:
        raise UserError(
            f"model.dtype: {config.model.dtype} ({str(dtype).removeprefix('torch.')}) given with "
            f"method.kind={method.kind} and engine.kind={kind}, which keeps no second copy of the "
            "weights; accepted: float32, or engine.kind=fsdp2 (torchrun --nproc_per_node=1 for one "
            "GPU)"
        )


def choose(config: Config, world: World, task: Task) -> tuple[str, str]:
    """(kind, why `auto` chose it; empty if configured). By the launcher, else by `engine.config`;
    under torchrun the backbone is replicated if it fits on one GPU, else sharded over the GPUs of
    each host if it fits and they have peer access, else sharded over all ranks. Raises UserError
    where the configured engine cannot run in this world."""
    asked = config.engine.kind
    if asked != "auto":
        if ENGINES[asked].one_process and world.size > 1:
            raise UserError(
                f"engine.kind: {asked} given with {world.size} processes; "
                f"accepted: auto, {_those_for(one_process=False)}"
            )
        return asked, ""
    if world.launcher == "deepspeed":
        return AUTO["deepspeed's launcher"], "its launcher was used"
    if config.engine.config:
        if world.launcher == "none":
            raise UserError(
                "engine.config: given without a launcher; accepted: under `deepspeed "
                "launch/train.py`"
            )
        return AUTO["engine.config"], "engine.config is given"
    if world.size == 1:
        return AUTO["one process"], "one process"
    if world.gpu_bytes == 0:
        return AUTO["split"], "no GPU"
    backbone = build(config, task, world.device)
    room, local_ranks = int(_STATES * world.gpu_bytes), min(len(ranks) for ranks in world.nodes)
    whole = estimate(backbone, config, world.size, "whole").total
    found = f"the whole backbone with adapters and moments takes {readable(whole)}, "
    if whole <= room:
        return AUTO["whole"], f"{found}at most {_STATES:.0%} of a GPU"
    found += f"more than {_STATES:.0%} of a GPU"
    if config.method.trains not in ENGINES[AUTO["blocks"]].trains:
        return AUTO["split"], f"{found}, and {AUTO['blocks']} does not train {config.method.kind}"
    if local_ranks == 1:
        return AUTO["split"], f"{found}, and each host has one GPU"
    if not world.peers:
        return AUTO["split"], f"{found}, and the GPUs of a host have no peer access"
    part = estimate(backbone, config, world.size, "blocks", local_ranks=local_ranks).total
    if part > room:
        return AUTO[
            "split"
        ], f"{found}; sharded over the GPUs of a host it still takes {readable(part)}"
    return AUTO["blocks"], f"{found}; sharded over the GPUs of a host it takes {readable(part)}"


def _those_for(*, one_process: bool) -> str:
    return ", ".join(kind for kind, e in ENGINES.items() if e.one_process == one_process)
