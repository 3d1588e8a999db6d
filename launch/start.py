"""What every entry point does first and last: configuration, processes, one error line."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml

from trainer import distributed
from trainer.config import Config, load_config
from trainer.distributed import World
from trainer.errors import UserError


@contextmanager
def launched(path: str, overrides: Sequence[str]) -> Iterator[tuple[Config, World]]:
    """The agreed configuration and this process's place; every failure ends the process.

    A user's mistake is one `error:` line, printed once, and a non-zero exit code on every rank.
    """
    world = World(rank=int(os.environ.get("RANK", "0")))
    try:
        config: Config | None = None
        failure: UserError | None = None
        try:
            config = load_config(path, overrides)
        except UserError as error:
            failure = error
        if failure is not None and "RANK" not in os.environ:
            raise failure
        engine = config.engine if config is not None else None
        world = distributed.start(*(engine.device, engine.timeout) if engine else ("cpu", 60.0))
        with world.together():
            if failure is not None:
                raise failure
        assert config is not None
        _agree(config, world)
        yield config, world
        distributed.stop(world)
    except Exception as error:
        distributed.report(error, world)
        distributed.stop(world, failed=True)
        sys.stdout.flush()
        # Not sys.exit: libraries' exit handlers may wait for ranks that are already gone.
        os._exit(distributed.exit_code(error))


def _agree(config: Config, world: World) -> None:
    """Refuse to start where the ranks were given different configurations."""
    texts = world.gather(config.to_yaml())
    for rank, text in enumerate(texts):
        if text != texts[0]:
            key, ours, theirs = _first_difference(yaml.safe_load(texts[0]), yaml.safe_load(text))
            raise UserError(
                f"{key}: {ours!r} on rank 0, {theirs!r} on rank {rank}; "
                "accepted: the same configuration on every rank"
            ) if world.is_main else distributed.FailedElsewhere(UserError.exit_code)


def _first_difference(a: object, b: object, path: str = "") -> tuple[str, object, object]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                inner = f"{path}.{key}" if path else str(key)
                return _first_difference(a.get(key), b.get(key), inner)
    return path, a, b
