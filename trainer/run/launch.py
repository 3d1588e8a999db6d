"""Setup and teardown of training and evaluation: configuration, process group, one error line.

torch is imported only after the configuration is accepted.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import yaml

from trainer import __version__
from trainer.config.config import Config, load_config
from trainer.distributed import launcher
from trainer.distributed.cuda_driver import start_driver
from trainer.distributed.failures import guarded
from trainer.errors import UserError
from trainer.records import phases

if TYPE_CHECKING:
    import torch

    from trainer.config.sections import EngineOptions
    from trainer.distributed.world import World


def configure_libraries() -> None:
    """Set environment variables that libraries read at import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(line: str) -> None:
    """Print a line, which must not wait in a buffer while the next phase lasts."""
    with suppress(OSError):  # the terminal may be gone
        print(line, flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Context of imports of large libraries. Without collections of garbage, which would go through
    the million objects that are made, all of which stay: a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_for_opening(options: "EngineOptions", device: "torch.device") -> None:
    """Import what a run would import as it opens: transformers' classes of tokenizers and models,
    and the compiler where blocks are compiled. A run sets aside what is there when it begins
    (`trainer/device_memory.py`): its collections of garbage then pass over these too."""
    import torch
    import transformers.generation.utils
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto  # noqa: F401

    if options.compile is True or (options.compile == "auto" and device.type == "cuda"):
        torch.compile(lambda: None)  # compiles nothing, but imports the compiler


@contextmanager
def launched(
    path: str, overrides: Sequence[str], *, announced: bool = False
) -> Iterator[tuple[Config, "World"]]:
    """Yields the configuration, the same on all ranks, and the World. `announced`: a line says what
    is begun, before torch is imported, which takes seconds.

    A UserError is one `error:` line, printed once, and a non-zero exit code on every rank.
    """
    launcher.watch()
    configure_libraries()
    with guarded():
        if announced:
            phases.begin("reading the configuration")
        config: Config | None = None
        failure: UserError | None = None
        try:
            launcher.refuse_accelerate_engine()
            config = load_config(path, overrides)
        except UserError as error:
            failure = error
        if announced and config is not None:
            start_driver(config.engine.device)
            phases.enter("importing torch")
            if config.log.shown != "none" and os.environ.get("RANK", "0") == "0":
                say(f"rankcast  {__version__}, {path}: importing torch")
                phases.tell(say)
        if failure is not None and "RANK" not in os.environ:
            raise failure
        with join(config, failure) as world:
            assert config is not None
            yield config, world


@contextmanager
def join(config: Config | None, failure: UserError | None = None) -> Iterator["World"]:
    """Join the process group. Raises UserError where the ranks' code or configurations differ."""
    with importing():
        from trainer.distributed import process_group
        from trainer.run.versions import refuse_other_versions

    phases.enter("starting the device")
    launcher.watch()
    engine = config.engine if config is not None else None
    world = process_group.start(*(engine.device, engine.timeout) if engine else ("cpu", 60.0))
    with world.all_or_none():
        if failure is not None:
            raise failure
    assert config is not None
    refuse_other_versions(world)
    texts = world.gather(config.to_yaml())
    with world.all_or_none():
        for rank, text in enumerate(texts):
            if text != texts[0]:
                key, ours, theirs = _first_difference(
                    yaml.safe_load(texts[0]), yaml.safe_load(text)
                )
                raise UserError(
                    f"{key}: {ours!r} on rank 0, {theirs!r} on rank {rank}; "
                    "accepted: the same configuration on every rank"
                )
    yield world
    process_group.stop()


def _first_difference(a: object, b: object, path: str = "") -> tuple[str, object, object]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                inner = f"{path}.{key}" if path else str(key)
                return _first_difference(a.get(key), b.get(key), inner)
    return path, a, b
