"""How far a run has come."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides what its parts know themselves."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Steps skipped since the loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    evaluated: int = 0
    """The last step after which was evaluated; a run that was stopped catches up."""

    def count(self, *, skipped: bool) -> None:
        """A step was done."""
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
