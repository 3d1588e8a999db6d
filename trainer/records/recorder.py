"""`Recorder`: output of the training loop; only rank 0 writes any."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.decision import Decision
from trainer.errors import RunFailed
from trainer.records.callbacks import Callback, Evaluated, StepRecord, UserCallbacks
from trainer.records.metrics import MetricsWriter

if TYPE_CHECKING:
    from trainer.report.result import Result


class Record(Callback):
    """A callback that writes somewhere until it is closed."""

    def close(self) -> None:
        """Close what is open. Called once, however the run ends."""


class Recorder(Callback):
    """Called alike on every rank."""

    def log_line(self, line: str) -> None:
        """Print a line on the terminal."""

    def set_state(self, state: str) -> None:
        """Enter a phase other than training steps, such as an evaluation."""

    def started(self, seconds: dict[str, float]) -> None:
        """The first step of this process is done; `seconds` of each phase before, in order."""

    @property
    def failure(self) -> RunFailed | None:
        """That of a user's callback, which ends the run."""
        return None

    def close(self) -> None:
        """Close the files."""


class SilentRecorder(Recorder):
    """Writes nothing: for ranks other than 0."""


class RunRecorder(Recorder):
    """Rank 0's recorder: metrics, terminal and heartbeat, other records, the user's callbacks."""

    def __init__(
        self,
        metrics: MetricsWriter,
        records: Sequence[Record] = (),
        users: UserCallbacks | None = None,
    ):
        self._metrics = metrics
        self._records: list[Any] = [metrics, *records]
        self._users = users or UserCallbacks()
        self._all: list[Callback] = [*self._records, self._users]

    @property
    def failure(self) -> RunFailed | None:
        return self._users.failure

    def log_line(self, line: str) -> None:
        self._metrics.log_line(line)

    def set_state(self, state: str) -> None:
        self._metrics.set_state(state)

    def started(self, seconds: dict[str, float]) -> None:
        self._metrics.started(seconds)

    def on_step(self, step: StepRecord) -> None:
        for one in self._all:
            one.on_step(step)

    def on_decision(self, step: int, decision: Decision) -> None:
        for one in self._all:
            one.on_decision(step, decision)

    def on_eval(self, evaluation: Evaluated) -> None:
        for one in self._all:
            one.on_eval(evaluation)

    def on_save(self, step: int, folder: Path) -> None:
        for one in self._all:
            one.on_save(step, folder)

    def on_end(self, result: "Result") -> None:
        for one in self._all:
            one.on_end(result)

    def close(self) -> None:
        failure = None
        for one in self._records:
            try:
                one.close()
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure
