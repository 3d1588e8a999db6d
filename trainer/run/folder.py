"""The run folder: its lock, description and records, and how the run ended. Rank 0 only."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from adapters.methods.base import InitialAdapter
from trainer.checkpoint import store
from trainer.config.validation import local
from trainer.decisions.log import AllocationLog
from trainer.errors import EXIT_REQUEUE, RunFailed, UserError
from trainer.files import (
    CHECKPOINTS,
    CONFIG,
    FIGURES,
    INITIAL,
    METRICS,
    UNITS,
    sha256,
    sync,
    write_text,
)
from trainer.loading.initial_adapters import save_initial_adapters
from trainer.records.callbacks import UserCallbacks
from trainer.records.heartbeat import Heartbeat
from trainer.records.metrics import MetricsWriter
from trainer.records.progress import Progress
from trainer.records.recorder import Record, Recorder, RunRecorder, SilentRecorder
from trainer.run.lock import Lock
from trainer.session import Session
from trainer.trackers.record import TrackerRecord, Trackers
from trainer.training.stop_request import StopRequest


class RunFolder:
    """Context manager: on exit writes the final heartbeat, closes the records, releases the lock.

    Other ranks enter it too, but neither lock nor write it."""

    def __init__(self, path: Path, users: UserCallbacks):
        self.path, self.lock, self._users = path, Lock(path), users
        self.recorder: Recorder = SilentRecorder()
        self._heartbeat: Heartbeat | None = None

    def take(self) -> None:
        """Lock the folder, if it exists. Raises UserError where another run holds the lock."""
        if local(self.path, "run.dir") is not None:
            self.lock.acquire()

    def begin(self) -> None:
        """Write the first heartbeat, before anything else in an existing folder."""
        if self.lock.held:
            self._heartbeat = Heartbeat(self.path)
            self._heartbeat.write()

    def make(self) -> None:
        """Create and lock the folder, if it did not exist. Raises UserError where that fails."""
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

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def describe(self, session: Session, initial_digest: str | None) -> str | None:
        """Write configuration, units and initial adapters. Returns the SHA-256 of the initial
        adapters; `initial_digest`: that of a resumed run, which has them already."""
        config, units = session.config, session.method.units
        try:
            self.checkpoints.mkdir(exist_ok=True)
            (self.path / FIGURES).mkdir(exist_ok=True)
            write_text(self.path / CONFIG, config.to_yaml(), durable=True)
            described = [{k: v for k, v in asdict(unit).items() if k != "index"} for unit in units]
            write_text(self.path / UNITS, json.dumps(described, indent=0), durable=True)
            if session.initial_adapters is not None:
                initial_digest = self._keep_initial(session.initial_adapters, initial_digest)
            for stale in self.checkpoints.glob(".step-*"):
                store.remove_partial(stale)
            sync(self.path)
            sync(self.path.parent)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return initial_digest

    def _keep_initial(
        self, initial_adapters: Mapping[str, InitialAdapter], digest: str | None
    ) -> str:
        """Write the initial adapters, unless a resumed run's file, of this `digest`, is there."""
        file = self.path / INITIAL
        if digest is None or not file.is_file() or sha256(file) != digest:
            return save_initial_adapters(initial_adapters, self.path)
        return digest

    def record(self, session: Session, steps: int, progress: Progress, stop: StopRequest) -> None:
        """Open the records: metrics, heartbeat, decisions and trackers."""
        assert self._heartbeat is not None
        config, decisions = session.config, None
        records: list[Record] = []
        metrics = MetricsWriter(config, self.path, steps, progress, self._heartbeat)
        if session.method.decides:
            limit = int(config.log.decisions_mib * 2**20)
            decisions = AllocationLog(self.path, session.method, progress.step, limit)
            records.append(decisions)
        trackers = [
            TrackerRecord(name, config, self.path, steps, progress.step, metrics.log_line)
            for name in config.log.all_trackers
        ]
        records.append(Trackers(trackers, metrics.log_line, lambda: stop.reason is not None))
        self.recorder = RunRecorder(metrics, records, self._users)
        for remark in (metrics.remark, decisions.remark if decisions is not None else ""):
            if remark:
                self.recorder.log_line(f"dropped   {remark}")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failure = error
        if isinstance(error, OSError):  # of a record; the checkpoint writer raises RunFailed
            failure = RunFailed(
                f"{error.filename or self.path}: {error.strerror or error}; last good checkpoint: "
                f"{store.newest(self.checkpoints) or 'none'}"
            )
        if self._heartbeat is not None and failure is None:
            self._heartbeat.end("done")
        elif self._heartbeat is not None:
            stopped = isinstance(failure, UserError) and failure.exit_code == EXIT_REQUEUE
            self._heartbeat.end("interrupted" if stopped else "failed", str(failure))
        with suppress(OSError):  # already reported
            self.recorder.close()
        self.lock.release()
        if failure is not None and failure is not error:
            raise failure from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"run.dir: {path} cannot be written ({error.strerror})")
