"""The engines by name; the one place that lists them.

Without torch: what the configuration has to know of an engine stands in its line here, and its
class is imported when it is used.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineEntry:
    """An engine's class, and what the configuration must know before it is imported."""

    engine: str
    """`module:Class`."""
    options: tuple[str, ...] = ()
    """The keys of `engine:` that only some engines take, of those that this one does: `config`,
    `copy_engines`, `unsharded_blocks`."""
    one_process: bool = False
    """It is made for one process, and needs no launcher."""


ENGINES = {
    "single": EngineEntry("trainer.engine.single:SingleEngine", one_process=True),
    "ddp": EngineEntry("trainer.engine.ddp:DDPEngine"),
    "peer": EngineEntry("trainer.engine.peer:PeerEngine", ("unsharded_blocks",)),
    "fsdp2": EngineEntry("trainer.engine.fsdp2:FSDP2Engine", ("unsharded_blocks", "copy_engines")),
    "deepspeed": EngineEntry("trainer.engine.deepspeed:DeepSpeedEngine", ("config",)),
}

AUTO = {
    "one process": "single",
    "deepspeed's launcher": "deepspeed",
    "engine.config": "deepspeed",
    "whole": "ddp",
    "blocks": "peer",
    "split": "fsdp2",
}
"""What `engine.kind: auto` takes: by the launcher, by a key, by how the backbone is spread over the
ranks (`Spread`)."""


def takes(kind: str, option: str) -> bool:
    """Whether an engine takes a key of `engine:` that only some do."""
    return option in ENGINES[kind].options


def that_take(option: str) -> str:
    """The names of the engines that take such a key: `peer or fsdp2`."""
    return " or ".join(kind for kind in ENGINES if takes(kind, option))
