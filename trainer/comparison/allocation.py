"""The last allocation of a run, for another that trains it from its first step: the control of what
an allocation is worth, without the steps in which it was found.

Permuted among matrices of equal shape, ranks and locations keep their histogram by shape, hence the
number of parameters; which matrix has which is random. Permuted among all matrices, whatever their
shape, they keep their histogram, and the number of parameters within 1 %.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from adapters.decision import Decision
from trainer.config.validation import shown
from trainer.errors import UserError
from trainer.files import UNITS
from trainer.records.jsonl import decision_files, read_objects

_NEAR = 0.01
"""Largest change of the number of parameters, as a share of it."""
_TRIES = 10_000
"""Permutations to be drawn until one is near enough, and exchanges to be tried where none was."""


@dataclass(frozen=True)
class Replayed:
    """An allocation to be written before a run, which replays it."""

    run: Path
    """The folder of the run that made it."""
    permuted: bool | Literal["any"]
    """Among matrices of equal shape, or among all."""
    seed: int
    """Of the permutation."""
    target: Path

    def write(self) -> None:
        """Write `target`, a record of one decision. Raises UserError where `run` made none, or none
        that can be permuted so."""
        method, decision = last_decision(self.run)
        if self.permuted:
            units = json.loads((self.run / UNITS).read_text(encoding="utf-8"))
            shapes = {unit["name"]: (unit["out_features"], unit["in_features"]) for unit in units}
            # `_exchanged` carries ranks and locations of matrices alone.
            if decision.survivors is not None or decision.extra or decision.ranks.keys() - shapes:
                raise UserError(
                    f"permuted: {shown(self.permuted)} given of {self.run}, whose method.kind="
                    f"{method} decides otherwise; accepted: a rank of every matrix, as of lelora"
                )
            exchange = shuffled if self.permuted == "any" else permuted
            decision = exchange(decision, shapes, self.seed)
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
    return _exchanged(decision, source)


def shuffled(decision: Decision, shapes: Mapping[str, tuple[int, int]], seed: int) -> Decision:
    """The decision with ranks and locations exchanged among all units: a random permutation of
    those that leave Σ_u r_u (in_u + out_u) within 1 % of what it was. If none of many does, random
    pairs of the last are exchanged while that brings the sum nearer. Raises UserError where this
    does not lead there either."""
    names, ranks = list(decision.ranks), np.array(list(decision.ranks.values()))
    sizes = np.array([sum(shapes[name]) for name in names])
    rng, source = np.random.default_rng(seed), np.arange(len(names))

    def distance(order: np.ndarray) -> int:
        return abs(int((ranks[order] - ranks) @ sizes))

    for attempt in range(2 * _TRIES):
        if attempt < _TRIES:
            source = rng.permutation(len(names))
        else:
            other, pair = source.copy(), rng.integers(len(names), size=2)
            other[pair] = source[pair[::-1]]
            source = min(source, other, key=distance)
        if distance(source) <= _NEAR * int(ranks @ sizes):
            return _exchanged(decision, {n: names[i] for n, i in zip(names, source, strict=True)})
    raise UserError(
        f"permuted: any given, but no permutation of the ranks of these {len(names)} matrices was "
        f"found that trains as many parameters within {_NEAR:.0%}; accepted: true"
    )


def _exchanged(decision: Decision, source: Mapping[str, str]) -> Decision:
    """Every unit with the rank and the location of its source."""
    return Decision(
        ranks={name: decision.ranks[source[name]] for name in decision.ranks},
        locations={name: decision.locations[source[name]] for name in decision.locations},
    )
