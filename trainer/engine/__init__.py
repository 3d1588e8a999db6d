"""The engines by name, and the choice that `engine.kind: auto` makes."""

import importlib
import os

from trainer.config import Config
from trainer.distributed import World
from trainer.engine.base import Engine
from trainer.errors import UserError

_ENGINES = {
    "single": ("trainer.engine.single", "SingleEngine"),
    "ddp": ("trainer.engine.ddp", "DDPEngine"),
    "fsdp2": ("trainer.engine.fsdp2", "FSDP2Engine"),
    "deepspeed": ("trainer.engine.deepspeed", "DeepSpeedEngine"),
}


def make_engine(config: Config, world: World) -> Engine:
    """The engine that the configuration asks for."""
    return engine_class(config, world)(config, world)


def engine_class(config: Config, world: World) -> type[Engine]:
    """Its class; its library is imported only then. UserError where it does not fit the launch."""
    kind: str = config.engine.kind
    if kind == "auto":
        kind = automatic_kind(config, world)
    if kind == "single" and world.size > 1:
        raise UserError(
            f"engine.kind: single given with {world.size} processes; "
            "accepted: auto, ddp, fsdp2, deepspeed"
        )
    if kind != "single" and "RANK" not in os.environ:
        raise UserError(
            f"engine.kind: {kind} given without a launcher; accepted: auto or single, or start "
            "with `deepspeed launch/train.py` or `torchrun launch/train.py`"
        )
    module, name = _ENGINES[kind]
    return getattr(importlib.import_module(module), name)


def automatic_kind(config: Config, world: World) -> str:
    """deepspeed under its launcher or with its JSON, fsdp2 under torchrun, else single."""
    if world.launcher == "deepspeed" or (config.engine.config and world.launcher != "none"):
        return "deepspeed"
    if config.engine.config:
        raise UserError(
            "engine.config: given without a launcher; accepted: under `deepspeed launch/train.py`"
        )
    return "fsdp2" if world.size > 1 else "single"
