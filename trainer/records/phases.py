"""Phases of a start, from the command to the end of the first step: a line as each begins, and the
seconds of all at the end. Of this process, as its memory is; other ranks than 0 say nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_say: Callable[[str], None] | None = None
_entered: list[tuple[str, float]] = []
"""(phase, when it began), in order; empty when nothing is being started."""


def begin(phase: str) -> None:
    """Begin a start. Nothing is said of it before `tell`."""
    global _say
    _say, _entered[:] = None, [(phase, time.perf_counter())]


def tell(say: Callable[[str], None]) -> None:
    """From now on `say` prints a line for each phase that is entered."""
    global _say
    _say = say


def tell_beside(say: Callable[[str], None]) -> None:
    """Where lines are printed, `say` prints them from now on: beside a bar."""
    if _say is not None:
        tell(say)


def is_begun() -> bool:
    """Whether something is being started."""
    return bool(_entered)


def enter(phase: str) -> None:
    """The phase before ends, this one begins. Ignored when nothing is being started."""
    if not _entered:
        return
    now = time.perf_counter()
    _entered.append((phase, now))
    if _say is not None:
        _say(f"start     {now - _entered[0][1]:.1f} s: {phase}")


def end() -> dict[str, float]:
    """End the start. Returns the seconds of each phase, in order; {} when nothing was started."""
    ends = [began for _, began in _entered[1:]] + [time.perf_counter()]
    found: dict[str, float] = {}
    for (phase, began), ended in zip(_entered, ends, strict=bool(_entered)):
        found[phase] = found.get(phase, 0.0) + ended - began
    _entered.clear()
    return found


@contextmanager
def until_step(say: Callable[[str], None] | None) -> Iterator[None]:
    """A run's start, unless the command has begun it; also where the run does not come as far as a
    step, nothing of it is left at the end."""
    if not is_begun():
        begin("beginning")
        if say is not None:
            tell(say)
    try:
        yield
    finally:
        end()


def described(seconds: dict[str, float]) -> str:
    """The phases in words."""
    parts = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s to the first step: {parts}"
