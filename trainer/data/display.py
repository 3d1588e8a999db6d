"""Progress of tokenising on the terminal: a bar, or plain lines."""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from trainer.config.sections import Shown
from trainer.records.bars import tqdm

_FIRST, _LONGEST = 5.0, 60.0
"""Seconds between two plain lines: at first, and after a while."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


class Display:
    """Context manager; says at once what is tokenised."""

    def __init__(self, name: str, shown: Shown, kept: int = 0):
        """`name`: of the source. `kept`: records that were tokenised before."""
        self._name, self._shown, self._kept = name, shown, kept
        self._began, self._share = time.monotonic(), 0.0
        self._bar: Any = None
        self._pause = _FIRST
        self._next = self._began + self._pause

    def __enter__(self) -> "Display":
        if self._shown == "bar":
            self._bar = tqdm(
                total=1.0, desc=f"tokenising {self._name}", bar_format=_BAR, dynamic_ncols=True
            )
        kept = f", {self._kept:,} records were done before" if self._kept else ""
        self.line(f"tokenising {self._name}{kept}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def begin(self, share: float | None) -> None:
        """Tokenising begins where that share of the source is done."""
        self._began, self._share = time.monotonic(), share or 0.0
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._share

    def show(self, records: int, share: float | None, workers: int) -> None:
        """`records` and `share` of the source are done; `workers`: processes that tokenise."""
        now = time.monotonic()
        rate = (records - self._kept) / max(now - self._began, 1e-9)
        figures = f"{records:,} records, {rate:,.0f}/s, {workers} processes"
        if workers == 1:
            figures = figures.replace("processes", "process")
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_postfix_str(figures, refresh=False)
                self._bar.update((share or 0.0) - self._bar.n)
        elif now >= self._next:
            self._pause = min(2 * self._pause, _LONGEST)
            self._next = now + self._pause
            self.line(f"tokenising {self._part(share, now)}{figures}")

    def line(self, text: str) -> None:
        """Print a line, unless there is a bar."""
        if self._bar is None:
            say(self._shown, text)

    def refresh(self) -> None:
        """Draw the bar again: time has passed."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.refresh()

    def _part(self, share: float | None, now: float) -> str:
        if share is None or share <= self._share:
            return ""
        left = (now - self._began) * (1 - share) / (share - self._share)
        return f"{share:.0%}, {timedelta(seconds=round(left))} left, "


def say(shown: Shown, text: str) -> None:
    """Print a line, unless nothing is to be shown."""
    if shown != "none":
        with suppress(OSError):  # a closed terminal does not end the run
            print(text, flush=True)
