"""A checkpoint to evaluate or export: all that is needed of it, read once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from trainer.checkpoint import store
from trainer.checkpoint.state import frozen_adapters, read_initial_adapters
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.files import CHECKPOINTS
from trainer.records.progress import Best

_T = TypeVar("_T")
_TRIES = 20


@dataclass(frozen=True)
class Saved:
    """What one manifest names, in memory: a run that still trains may delete the files."""

    checkpoint: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    initial_adapters: dict[str, InitialAdapter] | None
    """None without spectral initialisation."""
    remarks: Sequence[str] = ()
    """On damaged newer ones."""

    @property
    def title(self) -> str:
        """The step, and whether it is the run's best."""
        best, step = self.state.get("best"), self.state["step"]
        return str(Best(**best)) if best and best["step"] == step else f"step {step}"

    @property
    def frozen(self) -> dict[str, GatedAdapter]:
        """What earlier stages learned, frozen beside the adapters, by unit."""
        return frozen_adapters(self.tensors)


def read_saved(path: Path) -> Saved:
    """A checkpoint folder, or what a run folder has to give, verified: its best checkpoint where
    the run keeps it (`run.keep_best`), else the newest undamaged one. Raises UserError."""
    saved, remarks = _find(path, _read, lambda saved: saved.state)
    return replace(saved, remarks=remarks)


def is_saved(path: Path) -> bool:
    """Whether a folder is a checkpoint, or a run folder with one."""
    return (path / "manifest.json").is_file() or store.newest(path / CHECKPOINTS) is not None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of what `read_saved` finds."""
    return _find(path, store.verify, lambda state: state)[0]


def _find(
    path: Path, read: Callable[[Path], _T], state_of: Callable[[_T], Mapping[str, Any]]
) -> tuple[_T, list[str]]:
    if (path / "manifest.json").is_file():
        return read(path), []
    folder = path / CHECKPOINTS
    for _ in range(_TRIES):
        newest = store.newest(folder)
        try:
            _, found, remarks = store.find("auto", folder, read)
            best = None if found is None else state_of(found).get("best")
            if found is not None and best and best["step"] != state_of(found)["step"]:
                found = read(store.of_step(folder, best["step"]))
        except BadCheckpoint:
            if store.newest(folder) == newest:
                raise
            continue  # the run, which trains, has replaced it
        if found is None:
            if newest is not None or store.newest(folder) is not None:
                continue  # replaced while the folder was listed, which is not done at one moment
            raise UserError(
                f"{path}: neither a run folder with a checkpoint nor a checkpoint; accepted: "
                "runs/NAME or runs/NAME/checkpoints/step-00000100"
            )
        return found, remarks
    raise UserError(
        f"{path}: its run deletes checkpoints faster than they are read; accepted: a larger "
        "checkpoint.keep, or try again when it has ended"
    )


def read_on_all(path: Path, world: World) -> Saved:
    """The checkpoint that rank 0 finds, on every rank. Raises UserError. Collective."""
    saved = None
    with world.all_or_none():
        if world.is_main:
            saved = read_saved(path)
    checkpoint, state = world.broadcast(saved and (saved.checkpoint, saved.state))
    with world.all_or_none():
        if saved is None:
            saved = _read(checkpoint)
        if saved.state != state:
            raise BadCheckpoint(f"{checkpoint}: was replaced meanwhile; accepted: try again")
    assert saved is not None
    return saved


def _read(checkpoint: Path) -> Saved:
    state, tensors = store.load(checkpoint)
    return Saved(checkpoint, state, tensors, read_initial_adapters(checkpoint, state))
