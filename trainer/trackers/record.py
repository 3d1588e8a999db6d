"""`Trackers`: a run's record in each tracker. What fails there never fails the run.

Each tracker has a thread of its own, through which all its calls go in order: a slow or dead server
delays neither the steps nor the other trackers, and the end of the run only so long.
"""

import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.config import Config
from trainer.config.sections import LogOptions
from trainer.config.trackers import TRACKERS
from trainer.config.yaml import parse_json
from trainer.errors import UserError, first_line
from trainer.files import write_text
from trainer.records.callbacks import Callback, Evaluated, StepRecord
from trainer.records.metrics import finite_or_null
from trainer.records.recorder import Record
from trainer.report.result import Result

IDENTITIES = "trackers.json"
"""In the run folder: the identity of each tracker's run, for a resume."""
_BOARD_POINTS = 10_000
"""TensorBoard draws a thousand points of a curve; more of them only make its files grow."""
_PATIENCE = 60.0
"""Seconds that the end of a run waits for its trackers."""
_PATIENCE_WHEN_STOPPED = 5.0
"""The same after a failure or a request to stop: a launcher may kill the process soon."""
_POLL = 0.1  # seconds between two looks at a request to stop
_WAITING = 10_000
"""Calls that may wait for a slow tracker; further ones are dropped."""
_lock = threading.Lock()  # of the identities' file


def refuse_missing(log: LogOptions) -> None:
    """Raises UserError where a tracker's package is not installed."""
    for name in log.all_trackers:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"log.trackers: {name} given, but the package {TRACKERS[name]} is not installed; "
                f"accepted: pip install {TRACKERS[name].replace('_', '-')}, or log.trackers "
                "without it"
            )


class Trackers(Record):
    """All trackers that a run is logged to."""

    def __init__(
        self, trackers: Sequence["TrackerRecord"], say: Callable[[str], None],
        stopped: Callable[[], bool],
    ):  # fmt: skip
        """`say`: prints a line; `stopped`: whether the process was asked to stop."""
        self._trackers, self._say, self._stopped = trackers, say, stopped
        self._ended = False

    def on_step(self, step: StepRecord) -> None:
        for one in self._trackers:
            one.on_step(step)

    def on_eval(self, evaluation: Evaluated) -> None:
        for one in self._trackers:
            one.on_eval(evaluation)

    def on_end(self, result: Result) -> None:
        self._ended = True
        for one in self._trackers:
            one.on_end(result)

    def close(self) -> None:
        for one in self._trackers:
            one.end()
        begun, asked_to_stop = time.monotonic(), False
        patience, since = (
            (_PATIENCE, "the run") if self._ended else (_PATIENCE_WHEN_STOPPED, "the failure")
        )
        while working := [one for one in self._trackers if one.is_waited_for]:
            if not asked_to_stop and self._stopped():
                begun, asked_to_stop = time.monotonic(), True
                patience, since = _PATIENCE_WHEN_STOPPED, "the request to stop"
            if time.monotonic() - begun > patience:
                names = ", ".join(one.leave() for one in working)
                self._say(
                    f"tracker   {names}: not done {patience:g} s after {since}; left alone: the "
                    "last figures are in metrics.jsonl alone"
                )
                return
            working[0].wait(_POLL)


class TrackerRecord(Callback):
    """What a run logs, in one tracker."""

    def __init__(
        self, name: str, config: Config, folder: Path, steps: int, start: int,
        say: Callable[[str], None],
    ):  # fmt: skip
        """`start`: step at which the run begins or resumes; `say`: prints a line."""
        self.name, self._config, self._folder, self._say = name, config, folder, say
        self._spacing = steps / _BOARD_POINTS if name == "tensorboard" else 0.0
        self._next = 0.0  # the first step to draw next
        self._told, self._ended, self._closed = False, False, False
        self._lost, self._left = False, False
        self._backend: Any = None  # begun with what is first told it, not during the run's start
        self._start = start
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def on_step(self, step: StepRecord) -> None:
        if step.logged is not None and step.step >= self._next:
            self._next = step.step + self._spacing
            self._log("train/", step.logged)

    def on_eval(self, evaluation: Evaluated) -> None:
        self._log("eval/", evaluation.values)
        if evaluation.is_kept:
            self._call(lambda: self._backend.answers(evaluation.answers, evaluation.step))

    def on_end(self, result: Result) -> None:
        self._ended = True
        with suppress(UserError):  # of records that cannot be read, which the run has said
            for name, figure in _figures(result.folder):
                self._call(partial(self._draw, name, figure, result.step))

    def end(self) -> None:
        """After what it still has to do, and what it is told now, it ends."""
        if not self._closed:
            self._closed = True
            if self._told:  # else there is nothing to begin it for
                self._calls.put(lambda: self._backend.finish(ended=self._ended))
            self._calls.put(None)

    @property
    def is_waited_for(self) -> bool:
        return self._thread.is_alive() and not self._left

    def leave(self) -> str:
        """Wait for it no more, and let it say nothing. Returns its name."""
        self._left = True
        return self.name

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long."""
        self._thread.join(seconds)

    def _draw(self, name: str, figure: Any, step: int) -> None:
        self._backend.figure(name, figure, step)

    def _log(self, group: str, values: Mapping[str, Any]) -> None:
        finite = {
            name if "/" in name else group + name: value  # method/… names its own group
            for name, value in finite_or_null(dict(values)).items()
            if name != "step" and isinstance(value, int | float)
        }
        self._call(lambda: self._backend.log(finite, values["step"]))

    def _begin(self) -> None:
        from trainer.trackers.backend import backend  # its libraries take a second to import

        start = self._start
        identities = _read(self._folder)
        known = identities.get(self.name) if start > 0 else None
        self._backend = made = backend(self.name)(self._config, self._folder, start, known)
        if made.is_new:
            made.configure(dict(_flat(self._config.model_dump(mode="json"))))
        if made.identity is not None:
            with _lock:
                found = {**_read(self._folder), self.name: made.identity}
                write_text(self._folder / IDENTITIES, json.dumps(found))

    def _call(self, function: Callable[[], None]) -> None:
        self._told = True
        if self._calls.qsize() < _WAITING:
            self._calls.put(function)
        elif not self._lost:
            self._lost = True
            self._say(f"tracker   {self.name} is too slow: what it cannot take in time is lost")

    def _work(self) -> None:
        failed = False
        while (function := self._calls.get()) is not None:
            if failed:
                continue
            try:
                if self._backend is None:
                    self._begin()
                function()
            except BaseException as error:  # whatever a library does; SystemExit too
                failed = True
                if not self._left:
                    self._say(
                        f"tracker   {self.name} failed, the run goes on without it "
                        f"({type(error).__name__}: {first_line(error)})"
                    )


def _figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, figure) of the run, but for its loss."""
    from trainer.report.report import read_run, run_figures

    return ((f"figures/{name}", figure) for name, figure in run_figures(read_run(folder)))


def _read(folder: Path) -> dict[str, str]:
    try:
        found = parse_json((folder / IDENTITIES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)
