"""Progress counters of a run, saved in its checkpoints."""

import dataclasses


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

    def count(self, *, skipped: bool) -> None:
        """Count a finished step."""
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
