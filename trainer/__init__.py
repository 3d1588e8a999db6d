"""The trainer: configuration, data, backbone, engines, loop, checkpoints; and its Python API:

    import trainer
    result = trainer.finetune("configs/quickstart.yaml", train=records)

`finetune`, `Result`, `Callback`, `StepRecord`, `Evaluated`, `Config`, `load_config`, and the errors
`UserError`, `RunFailed`, `Diverged`, `Interrupted` are imported when they are asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api.finetune import finetune as finetune
    from trainer.config.config import Config as Config
    from trainer.config.config import load_config as load_config
    from trainer.errors import Diverged as Diverged
    from trainer.errors import RunFailed as RunFailed
    from trainer.errors import UserError as UserError
    from trainer.records.callbacks import Callback as Callback
    from trainer.records.callbacks import Evaluated as Evaluated
    from trainer.records.callbacks import StepRecord as StepRecord
    from trainer.report.result import Result as Result
    from trainer.training.stop_request import Interrupted as Interrupted

__version__ = "0.1.0"

_API = {
    "finetune": "trainer.api.finetune",
    "Config": "trainer.config.config",
    "load_config": "trainer.config.config",
    "Diverged": "trainer.errors",
    "RunFailed": "trainer.errors",
    "UserError": "trainer.errors",
    "Callback": "trainer.records.callbacks",
    "Evaluated": "trainer.records.callbacks",
    "StepRecord": "trainer.records.callbacks",
    "Result": "trainer.report.result",
    "Interrupted": "trainer.training.stop_request",
}
"""Modules by the names that they give to users."""


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("trainer.records.bars")  # before a library imports tqdm, which warns
    return getattr(importlib.import_module(_API[name]), name)


def __dir__() -> list[str]:
    return [*_API, "__version__"]
