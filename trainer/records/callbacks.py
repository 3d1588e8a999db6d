"""`Callback`: what a run tells while it trains. The project's own records are callbacks, and so are
those that a user gives to `trainer.finetune`.

Callbacks are called on rank 0, in the thread that trains, between two steps: they may take their
time, at the cost of the run's, but must not call collectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.decision import Decision
from trainer.errors import RunFailed, UserError, first_line

if TYPE_CHECKING:
    from trainer.report.result import Result

EVENTS = ("on_step", "on_decision", "on_eval", "on_save", "on_end")


@dataclass(frozen=True)
class StepRecord:
    """A finished optimizer step."""

    step: int
    """From 1."""
    loss: float
    """Mean over the learned tokens (or records) of the global batch; may be NaN."""
    learning_rate: float
    grad_norm: float
    """Before clipping; may be NaN."""
    epoch: float
    skipped: bool
    """Whether loss or gradient was not finite, so that nothing was updated."""
    logged: Mapping[str, Any] | None
    """The line of metrics.jsonl, every `log.every` steps; None in between."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation."""

    step: int
    """Optimizer steps made before it."""
    values: Mapping[str, Any]
    """The line of metrics.jsonl: scores, seconds, memory and, where the run keeps it, the best
    step."""
    answers: Sequence[Mapping[str, Any]]
    """To each record, of a task that has answers."""
    losses: Sequence[Mapping[str, Any]]
    """Of each record, with `log.record_losses`."""
    is_kept: bool
    """Whether predictions.jsonl holds these answers: the last evaluation, or the best one."""


class Callback:
    """The protocol: subclass it, or give an object that has some of the methods."""

    def on_step(self, step: StepRecord) -> None:
        """An optimizer step is finished."""

    def on_decision(self, step: int, decision: Decision) -> None:
        """An adaptive method has decided what holds from optimizer step `step` (from 0) on."""

    def on_eval(self, evaluation: Evaluated) -> None:
        """An evaluation is finished."""

    def on_save(self, step: int, folder: Path) -> None:
        """The checkpoint of `step` is whole, in `folder`. It is written in the background: told at
        the first step after that."""

    def on_end(self, result: "Result") -> None:
        """The run has made its steps and written what it leaves; not called where it failed or was
        interrupted."""


class UserCallbacks(Callback):
    """Callbacks that may raise: the first failure is kept in `failure`, which ends the run within a
    step, saved, on all ranks; nothing is called any more after it."""

    def __init__(self, callbacks: Sequence[Any] = ()):
        """Raises UserError for an object that has none of the methods."""
        for callback in callbacks:
            if not any(callable(getattr(callback, event, None)) for event in EVENTS):
                raise UserError(
                    f"callbacks: {callback!r} given; accepted: objects with one of "
                    f"{', '.join(EVENTS)} (a class is to be called first)"
                )
        self._callbacks = tuple(callbacks)
        self.failure: RunFailed | None = None

    def on_step(self, step: StepRecord) -> None:
        self._call("on_step", step.step, step)

    def on_decision(self, step: int, decision: Decision) -> None:
        self._call("on_decision", step, step, decision)

    def on_eval(self, evaluation: Evaluated) -> None:
        self._call("on_eval", evaluation.step, evaluation)

    def on_save(self, step: int, folder: Path) -> None:
        self._call("on_save", step, step, folder)

    def on_end(self, result: "Result") -> None:
        self._call("on_end", result.step, result)

    def _call(self, event: str, step: int, *values: Any) -> None:
        for callback in self._callbacks:
            function = getattr(callback, event, None)
            if self.failure is not None or function is None:
                continue
            try:
                function(*values)
            except (Exception, SystemExit) as error:  # of the user's code
                self.failure = RunFailed(
                    f"callbacks: {type(callback).__name__}.{event} raised {type(error).__name__} "
                    f"at step {step}: {first_line(error)}; the run is saved; accepted: a callback "
                    "that raises nothing, or none; start again to resume"
                )
                self.failure.__cause__ = error
