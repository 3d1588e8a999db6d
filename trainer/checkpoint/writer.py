"""Checkpoint writer: a snapshot at a step boundary, written by all ranks in the background."""

import concurrent.futures
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trainer import __version__
from trainer.checkpoint.state import random_state, session_tensors, sharded_tensors
from trainer.checkpoint.store import (
    FORMAT,
    PARTIAL,
    check_complete,
    expired,
    newest,
    of_step,
    remove,
    write_manifest,
)
from trainer.data.templates import set_template
from trainer.errors import RunFailed
from trainer.files import sync, take_place
from trainer.model.hub import hub_id
from trainer.records.progress import Progress
from trainer.session import Session


class Positioned(Protocol):
    """A source of steps, with the position behind the last step trained."""

    def state_dict(self) -> dict[str, int]: ...


class NoWriter:
    """In place of a `CheckpointWriter`: saves nothing, for runs of which only scores are kept."""

    failed = False

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, progress: Progress) -> None: ...
    def tell_saved(self) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class CheckpointWriter:
    """Saves a session, asynchronously if configured, and keeps the newest checkpoints."""

    def __init__(
        self,
        session: Session,
        batches: Positioned,
        folder: Path,
        initial_digest: str | None = None,
        verified: Mapping[str, str | int] | None = None,
        on_save: Callable[[int, Path], None] = lambda step, folder: None,
    ):
        """`initial_digest`: on rank 0, the SHA-256 of the run's initial adapters, if it has any.
        `verified`: the conditions under which the run was proved, if it was. `on_save`: told of a
        checkpoint that is whole, by `tell_saved`."""
        self.session, self.batches, self.folder = session, batches, folder
        self._initial_digest = initial_digest
        self._verified = None if verified is None else dict(verified)
        self._options = session.config.checkpoint
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = 0
        self._on_save, self._is_told = on_save, True

    def save(self, progress: Progress) -> None:
        """Snapshot to host memory, then write, in the background if asynchronous. Collective."""
        self.wait()
        tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in (session_tensors(self.session) | random_state(self.session)).items()
        }
        tensors |= sharded_tensors(self.session)
        state = self._describe(progress)
        self._pending_step, self._is_told = progress.step, False
        self._pending = self._thread.submit(self._write, tensors, state)
        if not self._options.asynchronous:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether a background write has failed."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def tell_saved(self) -> None:
        """Tell of the last checkpoint, once it is whole."""
        pending = self._pending
        if not self._is_told and pending is not None and pending.done() and not self.failed:
            self._is_told = True
            self._on_save(self._pending_step, of_step(self.folder, self._pending_step))

    def wait(self) -> None:
        """Wait for the pending write. Raises RunFailed where it failed. Collective."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])
        self.tell_saved()
        pending, self._pending = self._pending, None
        if self.session.world.gather(pending is None)[0]:
            return
        with self.session.world.all_or_none():
            assert pending is not None
            try:
                pending.result()
            except BaseException as error:  # torch's CheckpointException is no Exception
                last = newest(self.folder)
                raise RunFailed(
                    f"checkpoint of step {self._pending_step} could not be written in "
                    f"{self.folder}: {_root_cause(error)}; last good checkpoint: {last or 'none'}"
                ) from error

    def close(self) -> None:
        """Wait for the pending write, then end the thread. Collective."""
        self.wait()
        self._thread.shutdown()

    def _open(self, partial: Path) -> None:
        """Create the folder on rank 0. Raises OSError on all ranks where that fails."""
        world, problem = self.session.world, None
        try:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            problem = error.strerror or str(error)
        problem = world.gather(problem, world.saving)[0]
        if problem is not None:
            raise OSError(problem)

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Background thread: all ranks write tensors, rank 0 adds the other files and renames."""
        # Imported lazily: half a second that would delay the first step.
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        world = self.session.world
        final = of_step(self.folder, state["step"])
        partial = self.folder / f".{final.name}{PARTIAL}"
        try:
            self._open(partial)
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=world.saving,
            )
            if world.is_main:
                check_complete(partial, tensors.keys(), world.size)
                (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
                write_manifest(partial)
                take_place(partial, final)
                sync(self.folder)
                for old in expired(self.folder, self._options.keep):
                    remove(old)
        except BaseException:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _describe(self, progress: Progress) -> dict[str, Any]:
        session = self.session
        return {
            "format": FORMAT,
            "version": __version__,
            "step": progress.step,
            "progress": progress.counters,
            "best": None if progress.best is None else progress.best.model_dump(),
            "loader": self.batches.state_dict(),
            "engine": session.engine.kind,
            "world_size": session.world.size,
            "backbone": session.backbone.digest,
            "hub_id": hub_id(session.config.model),
            "weights": dict(session.backbone.weights),
            "data": session.train_data.digest,
            "labels": session.task.labels_state(),
            "chat_template": set_template(session.tokenizer, session.config.data),
            "initial": self._initial_digest,
            "unreached": list(session.backbone.unreached),
            "verified": self._verified,
            "config": session.config.model_dump(mode="json"),
        }


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error that torch.distributed.checkpoint wraps."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))[0]
        return _root_cause(inner)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
