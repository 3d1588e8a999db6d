"""Registry of the engines by name.

Does not import torch: an entry has all that the configuration needs, and the engine's class is
imported on use.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineEntry:
    """An engine's class, and its properties that the configuration needs without importing it."""

    engine: str
    """`module:Class`."""
    options: tuple[str, ...] = ()
    """Engine-specific keys of `engine:` that this engine supports: `config`, `copy_engines`,
    `cuda_graphs`, `unsharded_blocks`."""
    one_process: bool = False
    """Runs in one process without a launcher."""
    trains: tuple[str, ...] = ("adapters",)
    """What methods train under it (`adapters.methods.options.Trains`)."""
    full: str = ""
    """The class that shards a trained backbone, where it is another."""


_ALL = ("adapters", "modules", "backbone")

ENGINES = {
    "single": EngineEntry(
        "trainer.engine.single:SingleEngine", ("cuda_graphs",), one_process=True, trains=_ALL
    ),
    "ddp": EngineEntry("trainer.engine.ddp:DDPEngine", ("cuda_graphs",), trains=_ALL),
    "peer": EngineEntry("trainer.engine.peer:PeerEngine", ("unsharded_blocks",)),
    "fsdp2": EngineEntry(
        "trainer.engine.fsdp2:FSDP2Engine",
        ("unsharded_blocks", "copy_engines"),
        trains=_ALL,
        full="trainer.engine.fsdp2_full:FSDP2Full",
    ),
    "deepspeed": EngineEntry(
        "trainer.engine.deepspeed:DeepSpeedEngine",
        ("config",),
        trains=("adapters", "backbone"),
        full="trainer.engine.deepspeed_full:DeepSpeedFull",
    ),
}

AUTO = {
    "one process": "single",
    "deepspeed's launcher": "deepspeed",
    "engine.config": "deepspeed",
    "whole": "ddp",
    "blocks": "peer",
    "split": "fsdp2",
}
"""Choice of `engine.kind: auto` by launcher, by key, and by the distribution of the backbone over
the ranks (`Spread`)."""


def takes(kind: str, option: str) -> bool:
    """Whether an engine supports an engine-specific key of `engine:`."""
    return option in ENGINES[kind].options


def engines_that_train(what: str) -> str:
    """The names of the engines under which methods train this."""
    return ", ".join(kind for kind, entry in ENGINES.items() if what in entry.trains)


def engines_with(option: str) -> str:
    """The names of the engines that support such a key: `peer or fsdp2`."""
    return " or ".join(kind for kind in ENGINES if takes(kind, option))
