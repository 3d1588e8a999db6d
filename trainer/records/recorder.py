"""`Recorder`: output of the training loop; only rank 0 writes any."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trainer.files import LOSSES, PREDICTIONS
from trainer.records.jsonl import write_objects
from trainer.records.metrics import MetricsWriter


class DecisionLog(Protocol):
    """Sink of decisions."""

    def write(self, step: int, decision: Any) -> None:
        """Append a decision, made before optimizer step `step`."""

    def close(self) -> None: ...


class Recorder(Protocol):
    """Called alike on every rank."""

    def log_line(self, line: str) -> None:
        """Print a line on the terminal."""

    def write(self, values: dict[str, Any]) -> None:
        """Write a logged step or an evaluation."""

    def advance(self, step: int, loss: float, *, skipped: bool) -> None:
        """Report a finished step."""

    def decided(self, step: int, decision: Any) -> None:
        """Record a decision (None: none was made) before optimizer step `step`."""

    def answered(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Record what was answered to each record of an evaluation; none: by a task without."""

    def judged(self, step: int, losses: Sequence[Mapping[str, Any]]) -> None:
        """Record the loss of each record of an evaluation."""

    def set_state(self, state: str) -> None:
        """Enter a phase other than training steps, such as an evaluation."""

    def close(self) -> None:
        """Close the files."""


class SilentRecorder:
    """Writes nothing: for ranks other than 0."""

    def log_line(self, line: str) -> None: ...
    def write(self, values: dict[str, Any]) -> None: ...
    def advance(self, step: int, loss: float, *, skipped: bool) -> None: ...
    def decided(self, step: int, decision: Any) -> None: ...
    def answered(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None: ...
    def judged(self, step: int, losses: Sequence[Mapping[str, Any]]) -> None: ...
    def set_state(self, state: str) -> None: ...
    def close(self) -> None: ...


class RunRecorder:
    """Rank 0's recorder: metrics, terminal, heartbeat and, where the method makes decisions, their
    log (`decisions`)."""

    def __init__(self, metrics: MetricsWriter, decisions: DecisionLog | None):
        self._metrics, self._decisions = metrics, decisions
        self.log_line, self.write, self.advance = metrics.log_line, metrics.write, metrics.advance
        self.set_state = metrics.heartbeat.set_state

    def decided(self, step: int, decision: Any) -> None:
        if self._decisions is not None and decision is not None:
            self._decisions.write(step, decision)

    def answered(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        if answers:
            file = self._metrics.file.with_name(PREDICTIONS)
            write_objects(file, ({"step": step, **answer} for answer in answers))
            self._metrics.write_answers(step, answers)

    def judged(self, step: int, losses: Sequence[Mapping[str, Any]]) -> None:
        write_objects(
            self._metrics.file.with_name(LOSSES), ({"step": step, **one} for one in losses)
        )

    def close(self) -> None:
        try:
            self._metrics.close()
        finally:
            if self._decisions is not None:
                self._decisions.close()
