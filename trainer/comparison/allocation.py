"""The last allocation of a run, for another that trains it from its first step: the control of what
an allocation is worth, without the steps in which it was found.

Permuted among matrices of equal shape, ranks and locations keep their histogram by shape, hence the
number of parameters; which matrix has which is random.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.decision import Decision
from trainer.errors import UserError
from trainer.files import UNITS
from trainer.records.jsonl import decision_files, read_objects


@dataclass(frozen=True)
class Replayed:
    """An allocation to be written before a run, which replays it."""

    run: Path
    """The folder of the run that made it."""
    seed: int | None
    """Of the permutation; None: as it is."""
    target: Path

    def write(self) -> None:
        """Write `target`, a record of one decision. Raises UserError where `run` made none."""
        method, decision = last_decision(self.run)
        if self.seed is not None:
            units = json.loads((self.run / UNITS).read_text(encoding="utf-8"))
            shapes = {unit["name"]: (unit["out_features"], unit["in_features"]) for unit in units}
            decision = permuted(decision, shapes, self.seed)
        line = {"step": 0, "method": method, "digest": decision.digest(), **decision.to_plain()}
        self.target.write_text(json.dumps(line) + "\n", encoding="utf-8")


def last_decision(run: Path) -> tuple[str, Decision]:
    """(method, decision) of a run's last line. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; accepted: that of a run, made on this machine")
    for file in reversed(decision_files(run)):
        lines = list(read_objects(file))
        if lines:
            return lines[-1]["method"], Decision.from_plain(lines[-1])
    raise UserError(f"{run}: no decision was recorded in it; accepted: a finished run that decides")


def permuted(decision: Decision, shapes: Mapping[str, tuple[int, int]], seed: int) -> Decision:
    """The decision with ranks and locations exchanged among units of equal shape."""
    rng, source = np.random.default_rng(seed), dict[str, str]()
    for shape in sorted({shapes[name] for name in decision.ranks}):
        names = [name for name in decision.ranks if shapes[name] == shape]
        source |= dict(zip(names, rng.permutation(names).tolist(), strict=True))
    return Decision(
        ranks={name: decision.ranks[source[name]] for name in decision.ranks},
        locations={name: decision.locations[source[name]] for name in decision.locations},
    )
