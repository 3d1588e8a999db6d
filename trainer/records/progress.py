"""Progress counters of a run, saved in its checkpoints."""

import dataclasses

from pydantic import Field

from adapters.options import Section


class Best(Section):
    """The best evaluation of a run so far (`run.keep_best`)."""

    metric: str
    step: int = Field(gt=0)
    score: float
    data: str
    """Digest of the records that were evaluated on."""

    def __str__(self) -> str:
        return f"step {self.step}, the best by {self.metric} ({self.score:.6g})"


@dataclasses.dataclass
class Progress:
    """Counters of the training loop; loader, optimizer and method have state of their own."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Steps skipped since the loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    evaluated: int = 0
    """Step of the last evaluation; a resumed run makes up for a missed one."""
    waited: int = 0
    """Evaluations since the best one."""
    best: Best | None = None

    def count(self, *, skipped: bool) -> None:
        """Count a finished step."""
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def counters(self) -> dict[str, int]:
        """All but `best`."""
        counters = dict(vars(self))
        del counters["best"]
        return counters
