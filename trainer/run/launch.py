"""What every entry point does first and last: configuration, processes, one error line."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml

from trainer.config.config import Config, load_config
from trainer.distributed import world as distributed
from trainer.distributed.world import World
from trainer.errors import UserError


@contextmanager
def guarded() -> Iterator[None]:
    """End the process on any failure: one line, a non-zero exit code, nobody waited for."""
    try:
        yield
    except Exception as error:
        distributed.report(error)
        sys.stdout.flush()
        # Not sys.exit, and no farewell to the process group: both may wait for ranks that are gone.
        os._exit(distributed.exit_code(error))


@contextmanager
def launched(path: str, overrides: Sequence[str]) -> Iterator[tuple[Config, World]]:
    """The agreed configuration and this process's place among the ranks.

    A user's mistake is one `error:` line, printed once, and a non-zero exit code on every rank.
    """
    with guarded():
        config: Config | None = None
        failure: UserError | None = None
        try:
            config = load_config(path, overrides)
        except UserError as error:
            failure = error
        if failure is not None and "RANK" not in os.environ:
            raise failure
        with join(config, failure) as world:
            assert config is not None
            yield config, world


@contextmanager
def join(config: Config | None, failure: UserError | None = None) -> Iterator[World]:
    """Join the other processes; go on only if all of them have the same configuration."""
    engine = config.engine if config is not None else None
    world = distributed.start(*(engine.device, engine.timeout) if engine else ("cpu", 60.0))
    with world.all_or_none():
        if failure is not None:
            raise failure
    assert config is not None
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
    distributed.stop()


def _first_difference(a: object, b: object, path: str = "") -> tuple[str, object, object]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                inner = f"{path}.{key}" if path else str(key)
                return _first_difference(a.get(key), b.get(key), inner)
    return path, a, b
