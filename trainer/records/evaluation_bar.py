"""How far an evaluation is, on a terminal."""

from contextlib import suppress
from types import TracebackType
from typing import Any

from trainer.config.sections import Shown
from trainer.records.bars import tqdm


class EvaluationBar:
    """Context manager: a bar where bars are shown, which goes when the context ends."""

    def __init__(self, name: str, batches: int, shown: Shown):
        self._bar: Any = None
        if shown == "bar":
            with suppress(OSError):  # a closed terminal does not end the run
                self._bar = tqdm(
                    total=batches, desc=f"evaluating {name}".strip(), unit="batch", leave=False,
                    dynamic_ncols=True,
                )  # fmt: skip

    def advance(self) -> None:
        """A batch is done."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(1)

    def __enter__(self) -> "EvaluationBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
