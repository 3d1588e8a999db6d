"""What the loop tells of a run; rank 0 writes it down, other ranks are silent."""

from typing import Any, Protocol

from trainer.records.metrics import MetricsWriter


class DecisionLog(Protocol):
    """Where decisions are written, one after the other."""

    def write(self, step: int, decision: Any) -> None:
        """One decision, made before optimizer step `step`."""

    def close(self) -> None: ...


class Recorder(Protocol):
    """The same calls on every rank."""

    def say(self, line: str) -> None:
        """A line for the person who watches."""

    def write(self, values: dict[str, Any]) -> None:
        """A logged step, or an evaluation."""

    def advance(self, step: int, loss: float, *, skipped: bool) -> None:
        """One step was done."""

    def decided(self, step: int, decision: Any) -> None:
        """A decision (None: there was none) before optimizer step `step`."""

    def tell(self, state: str) -> None:
        """Something other than steps goes on, and may take long."""

    def close(self) -> None:
        """Nothing more is written."""


class SilentRecorder:
    """Of ranks that write nothing."""

    def say(self, line: str) -> None: ...
    def write(self, values: dict[str, Any]) -> None: ...
    def advance(self, step: int, loss: float, *, skipped: bool) -> None: ...
    def decided(self, step: int, decision: Any) -> None: ...
    def tell(self, state: str) -> None: ...
    def close(self) -> None: ...


class RunRecorder:
    """Rank 0's: metrics, the terminal and the heartbeat, and decisions where the method makes any
    (`decisions`)."""

    def __init__(self, metrics: MetricsWriter, decisions: DecisionLog | None):
        self._metrics, self._decisions = metrics, decisions
        self.say, self.write, self.advance = metrics.say, metrics.write, metrics.advance
        self.tell = metrics.heartbeat.tell

    def decided(self, step: int, decision: Any) -> None:
        if self._decisions is not None and decision is not None:
            self._decisions.write(step, decision)

    def close(self) -> None:
        try:
            self._metrics.close()
        finally:
            if self._decisions is not None:
                self._decisions.close()
