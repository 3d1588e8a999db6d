"""`finetune`: a whole run from Python. docs/python.md shows it at work."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trainer.api.memory_source import sources_of
from trainer.config.config import Config, overridden, parse_config, read_config
from trainer.data.cache import default_root
from trainer.distributed import launcher
from trainer.distributed.failures import guarded
from trainer.errors import UserError
from trainer.report.result import Result
from trainer.run.launch import configure_libraries, join


def finetune(
    config: Config | Mapping[str, Any] | str | Path,
    train: Any = None,
    eval: Any = None,
    callbacks: Sequence[Any] = (),
    overrides: Sequence[str] = (),
) -> Result:
    """Train as `rankcast train` does, and return what the run left in its folder.

    `config`: the path of a YAML file, its sections as nested dictionaries, or a `Config`. A run is
    known by its name: run again, it resumes from its newest checkpoint, and a finished one returns
    at once. `overrides`: as on the command line, `"optim.learning_rate=1e-3"`.

    `train`, `eval`: in place of `data.train` and `data.eval`: a `datasets.Dataset`, a pandas
    DataFrame, a list of dictionaries, or what the keys accept (a path, a list of paths; `eval` also
    a number or a share of the training records, or a dictionary of several sets by name).

    `callbacks`: objects with some of the methods of `trainer.Callback`.

    Raises UserError with the line that the command prints after `error:`; its subclasses
    Interrupted (after Ctrl-C, or a time limit: saved, run again to resume), RunFailed (also where a
    callback raised; the cause is its exception) and Diverged. Under a launcher of several processes
    every rank calls this alike, and a failure prints its line and ends all processes, as the
    command does.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    configure_libraries()
    with guarded() if launched else nullcontext():
        made, failure = None, None
        try:
            launcher.refuse_accelerate_engine()
            made = _config(config, train, eval, overrides)
        except UserError as error:
            if not launched:
                raise
            failure = error  # of one rank, or of all: one line
        with join(made, failure) as world:
            assert made is not None
            from trainer.run.run import run
            from trainer.training.stop_request import StopRequest

            with StopRequest(made.run) as stop:
                run(made, world, stop, callbacks)
    assert made is not None
    return Result(made.run_folder.absolute())


def _config(config: Any, train: Any, eval: Any, overrides: Sequence[str]) -> Config:
    """The configuration, with paths of what was in memory. Raises UserError."""
    if isinstance(config, str | Path):
        raw = overridden(read_config(config), overrides, Path(config).stem)
    elif isinstance(config, Config):
        raw = overridden(config.model_dump(mode="json"), overrides)
    elif isinstance(config, Mapping):
        raw = overridden(config, overrides)
    else:
        raise UserError(
            f"config: {type(config).__name__} given; accepted: the path of a YAML file, a "
            "dictionary of sections, or a trainer.Config"
        )
    data = raw.get("data") or {}
    if isinstance(data, Mapping):
        cache = data.get("cache")
        folder = (Path(cache) if isinstance(cache, str) else default_root()) / "from_memory"
        given = {"train": train, "eval": eval}
        sources = {k: sources_of(v, k, folder) for k, v in given.items() if v is not None}
        raw["data"] = {**data, **sources}
    made = parse_config(raw)
    if not made.run.name:
        raise UserError("run.name: missing; accepted: the name of the run's folder")
    return made
