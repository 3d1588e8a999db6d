"""Where a run starts: at step 0 or at a checkpoint, and whether it may."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from trainer.checkpoint.compatibility import changes, check_options
from trainer.checkpoint.state import frozen_adapters, read_initial_adapters
from trainer.checkpoint.store import clear_the_way, find, read_tensors, verify
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.files import METRICS
from trainer.records.progress import Progress
from trainer.run.folder import RunFolder
from trainer.run.shared import refuse_unshared
from trainer.training.best import is_exhausted


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a checkpoint or at step 0."""

    checkpoint: Path | None
    """To resume from; None: start at step 0."""
    state: dict[str, Any]
    """The checkpoint's state.json."""
    remarks: list[str]
    """On damaged checkpoints."""

    @cached_property
    def frozen(self) -> dict[str, GatedAdapter]:
        """What earlier stages learned, by unit, from the checkpoint."""
        if self.checkpoint is None or self.state["config"]["model"].get("adapter") is None:
            return {}
        return frozen_adapters(read_tensors(self.checkpoint))

    @property
    def unreached(self) -> list[str] | None:
        """Layers whose output does not reach the loss, as the resumed run found them."""
        return None if self.checkpoint is None else self.state.get("unreached", [])

    def initial_adapters(self) -> tuple[dict[str, InitialAdapter] | None, BadCheckpoint | None]:
        """Initial adapters of the resumed run, or why they have to be computed again."""
        if self.checkpoint is None:
            return None, None
        try:
            return read_initial_adapters(self.checkpoint, self.state), None
        except BadCheckpoint as error:
            return None, error


def choose_start(config: Config, world: World, folder: RunFolder) -> Start:
    """The checkpoint that rank 0 finds. Refuses to overwrite a run (UserError). Collective."""
    found = Start(None, {}, [])
    refuse_unshared(config.run_folder, world)
    with world.all_or_none():
        if world.is_main:
            folder.take()
            checkpoint, state, remarks = find(config.run.resume, folder.checkpoints, verify)
            found = Start(checkpoint, state or {}, remarks)
            if config.run.resume == "never" and (folder.path / METRICS).exists():
                raise UserError(
                    f"run.resume: never given, but {folder.path} holds a run already; accepted: "
                    "another run.name, or run.resume=auto"
                )
            if found.checkpoint is not None:
                check_options(config, found.checkpoint, found.state)
            step = found.state.get("step", 0)
            found.remarks.extend(clear_the_way(folder.checkpoints, step, config.run.resume))
    found = Start(*world.broadcast((found.checkpoint, found.state, found.remarks)))
    with world.all_or_none():
        if found.checkpoint is not None and not world.is_main:
            verify(found.checkpoint)
    return found


def refuse_made(start: Start, config: Config, progress: Progress, steps: int) -> None:
    """Raises UserError where the run has made its `steps` already, and more or otherwise."""
    if progress.step > steps:
        given = "run.steps" if config.run.steps is not None else "run.epochs"
        raise UserError(
            f"{given}: {steps} steps given, but {start.checkpoint} has made {progress.step}; "
            f"accepted: {progress.step} or more, or another run.name for a new run"
        )
    has_ended = progress.step == steps or is_exhausted(config, progress)
    if edited := _edited(start, config) if has_ended else []:
        raise UserError(
            f"run.name: {config.run_folder} has made all of its {progress.step} steps, so this "
            f"configuration ({', '.join(edited)}) would train nothing; accepted: another "
            f"run.name (with model.adapter={config.run_folder} it starts from what that run "
            "learned), more steps or epochs, or the configuration as it was"
        )


def _edited(start: Start, config: Config) -> list[str]:
    """Keys that differ from those of the resumed run and change what it trains or reports."""
    if start.checkpoint is None:
        return []
    return changes(start.state, config, evaluation=True)
