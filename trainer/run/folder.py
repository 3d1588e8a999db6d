"""A run's folder: whose it is, what is written into it, and how the run ended. Rank 0's."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from trainer.checkpoint import store
from trainer.config.validation import local
from trainer.decisions.log import AllocationLog
from trainer.errors import RunFailed, UserError
from trainer.loading.spectral_init import INITIAL, save_starts
from trainer.records.heartbeat import Heartbeat
from trainer.records.jsonl import METRICS
from trainer.records.metrics import MetricsWriter
from trainer.run.lock import Lock
from trainer.session import Session
from trainer.training.stop_request import Interrupted


class RunFolder:
    """As a context: however the run ends, the heartbeat says so, files are closed, others may have
    the folder. Other ranks hold one too, and leave it alone."""

    def __init__(self, path: Path):
        self.path, self.lock = path, Lock(path)
        self.heartbeat: Heartbeat | None = None
        self.metrics: MetricsWriter | None = None
        self.log: AllocationLog | None = None

    def take(self) -> None:
        """Keep others off the folder, if there is one yet. Raises UserError where one is on it."""
        if local(self.path, "run.dir") is not None:
            self.lock.acquire()

    def begin(self) -> None:
        """The run is going to change the folder, which is there: say so."""
        if self.lock.held:
            self.heartbeat = Heartbeat(self.path)
            self.heartbeat.write()

    def make(self) -> None:
        """Where there was none there is one now, and it is ours."""
        if self.lock.held:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.lock.acquire()
        if (self.path / METRICS).exists():
            raise UserError(
                f"run.name: {self.path} was made by another run just now; accepted: another "
                "run.name, or start again"
            )
        self.begin()

    def describe(self, session: Session) -> None:
        """What the run is: configuration, units, initial tensors."""
        config, units = session.config, session.method.units
        try:
            (self.path / "checkpoints").mkdir(exist_ok=True)
            (self.path / "figures").mkdir(exist_ok=True)
            (self.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            described = [{k: v for k, v in asdict(unit).items() if k != "index"} for unit in units]
            (self.path / "units.json").write_text(json.dumps(described, indent=0), encoding="utf-8")
            written = session.initial_digest is not None and (self.path / INITIAL).is_file()
            if session.initial_adapters is not None and not written:
                session.initial_digest = save_starts(session.initial_adapters, self.path)
            for stale in (self.path / "checkpoints").glob(".step-*"):
                store.remove_partial(stale)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failure = error
        if isinstance(error, OSError):  # of a record; the checkpoint writer has its own words
            failure = RunFailed(
                f"{error.filename or self.path}: {error.strerror or error}; last good checkpoint: "
                f"{store.newest(self.path / 'checkpoints') or 'none'}"
            )
        if self.heartbeat is not None and failure is None:
            self.heartbeat.end("done")
        elif self.heartbeat is not None:
            stopped = isinstance(failure, Interrupted)
            self.heartbeat.end("interrupted" if stopped else "failed", str(failure))
        for file in (self.metrics, self.log):
            if file is not None:
                with suppress(OSError):  # what could not be written has been said
                    file.close()
        self.lock.release()
        if failure is not None and failure is not error:
            raise failure from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"run.dir: {path} cannot be written ({error.strerror})")
