"""History of a run's decisions (units.json, allocation.jsonl) by unit and step. Imports neither
torch nor matplotlib.

A decision holds until the next one, so means over time weight it by the steps it held.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapters.banks import LOCATIONS
from adapters.decision import Decision
from adapters.unit import Unit, third
from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.files import UNITS
from trainer.records.jsonl import decision_files, read_objects

Groups = Mapping[str, Sequence[int]]
"""Indices of units by the label of their group."""


@dataclass
class Track:
    """A value per unit and decision: `rows[i]` (units) holds from `steps[i]` to `steps[i + 1]`."""

    steps: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, step: int, row: np.ndarray) -> None:
        while self.steps and self.steps[-1] >= step:  # repeated by a resumed run
            self.steps.pop(), self.rows.pop()
        self.steps.append(step)
        self.rows.append(row)

    def held(self, start: float, end: int) -> np.ndarray:
        """Number of steps between `start` and `end` that each decision held (decisions)."""
        return np.diff(np.clip([*self.steps, end], start, end))

    def spans(self, groups: Groups, end: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges (columns + 1) in steps, and means (groups, columns) between them.

        A column is a decision; with more than `most`, it is one of `most` equal spans of steps.
        """
        edges = np.array([*self.steps, end], dtype=float)
        weights = np.zeros((len(self.rows[0]), len(groups)))
        for index, group in enumerate(groups.values()):
            weights[list(group), index] = 1 / len(group)
        values = np.stack(self.rows) @ weights
        if len(values) > most:
            sums = np.cumsum(values * np.diff(edges)[:, None], axis=0)
            sums = np.vstack([np.zeros(len(groups)), sums])
            equal = np.linspace(edges[0], end, most + 1)
            at_edges = np.stack([np.interp(equal, edges, column) for column in sums.T], axis=1)
            edges, values = equal, np.diff(at_edges, axis=0) / np.diff(equal)[:, None]
        return edges, values.T


@dataclass
class Allocation:
    """All decisions of a run, up to step `end`.

    Locations are indices of LOCATIONS, -1 where the rank is 0; a score is NaN where it is not
    recorded.
    """

    units: list[Unit]
    ranks: Track = field(default_factory=Track)
    locations: Track = field(default_factory=Track)
    scores: dict[str, Track] = field(default_factory=dict)
    """Scores of every unit, by name."""
    numbers: dict[str, Track] = field(default_factory=dict)
    """Other scores and numbers of decisions by name: one value each, not one per unit."""
    survivors: frozenset[str] | None = None
    end: int = 0

    @cached_property
    def names(self) -> set[str]:
        """Names that a decision may use: units, layers, `all`."""
        return {"all", *(u.name for u in self.units), *(str(u.layer) for u in self.units)}


def read_allocation(folder: Path, rank: float, end: int) -> Allocation | None:
    """The decisions recorded in a run folder; None where there are none. Raises UserError.

    `rank`: rank of the units until survivors are selected. `end`: last logged step.
    """
    allocation: Allocation | None = None
    for file in decision_files(folder):
        for number, line in enumerate(read_objects(file), 1):
            allocation = allocation or Allocation(read_units(folder / UNITS), end=end)
            try:
                _take(allocation, line["step"], Decision.from_plain(line), rank)
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file} line {number}: no decision about the units of units.json "
                    f"({type(error).__name__}: {error})"
                ) from error
    return allocation


def read_units(file: Path) -> list[Unit]:
    """The units of a run, in order."""
    keys = ("name", "layer", "kind", "out_features", "in_features")
    try:
        entries = parse_json(file.read_text(encoding="utf-8"))
        units = [Unit(i, *(entry[key] for key in keys)) for i, entry in enumerate(entries)]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; allocation.jsonl needs it") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: not a list of units; accepted: a file that a run wrote"
        ) from error
    if not units:
        raise UserError(f"{file}: no unit in it; accepted: a file that a run wrote")
    return units


def _take(allocation: Allocation, step: int, decision: Decision, rank: float) -> None:
    """Add the decision of one line of allocation.jsonl."""
    units = allocation.units
    scores = {key: v for key, v in decision.scores.items() if isinstance(v, Mapping)}
    numbers = {key: v for key, v in decision.scores.items() if isinstance(v, float)}
    numbers |= {key: v for key, v in decision.extra.items() if type(v) in (int, float)}
    named: dict[str, Any] = {"ranks": decision.ranks, "locations": decision.locations, **scores}
    for key, names in {**named, "survivors": decision.survivors or ()}.items():
        for name in names:
            if name not in allocation.names:
                raise ValueError(f"{name} in {key}")
    allocation.end = max(allocation.end, step + 1)
    if not allocation.ranks.steps and (scores or decision.survivors is not None):
        allocation.ranks.add(0, _row(units, {"all": rank}))
    if decision.survivors is not None:
        allocation.survivors = frozenset(decision.survivors)
        ranks = dict.fromkeys(
            allocation.survivors, rank
        )  # overridden below by ranks in the decision
        allocation.ranks.add(step, _row(units, ranks))
    if decision.ranks:
        allocation.ranks.add(step, _row(units, decision.ranks))
    if decision.locations:
        index = {name: LOCATIONS.index(where) for name, where in decision.locations.items()}
        row = _row(units, index, absent=-1)
        row[_row(units, decision.ranks, absent=1) == 0] = -1
        allocation.locations.add(step, row.astype(np.int8))
    for key, by_unit in scores.items():
        track = allocation.scores.setdefault(key, Track())
        track.add(step, _row(units, by_unit, absent=np.nan))
    for key, value in numbers.items():
        allocation.numbers.setdefault(key, Track()).add(step, np.array([value], float))


def _row(units: Sequence[Unit], values: Mapping[str, float], absent: float = 0.0) -> np.ndarray:
    """Values by unit, by layer or for `all`, as one value per unit (units)."""
    common = values.get("all", absent)
    return np.array([values.get(u.name, values.get(str(u.layer), common)) for u in units], float)


def by_layer(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Units of each transformer block; those outside the blocks last, as `other`."""
    layers: dict[str, list[int]] = {}
    for unit in sorted(units, key=lambda u: (u.layer is None, u.layer or 0)):
        layers.setdefault("other" if unit.layer is None else str(unit.layer), []).append(unit.index)
    return layers


def by_type(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Units of each matrix type, in the order of the model; all experts' matrices are one type."""
    kinds: dict[str, list[int]] = {}
    for unit in units:
        kind = re.sub(r"(\bexperts\b.*?)\.\d+(?=\.|$)", r"\1", unit.kind)
        kinds.setdefault(kind, []).append(unit.index)
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    return {
        short[kind] if list(short.values()).count(short[kind]) == 1 else kind: indices
        for kind, indices in kinds.items()
    }


def by_third(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Units of the front, middle and back third of the blocks."""
    layers = [u.layer for u in units if u.layer is not None]
    thirds: dict[str, list[int]] = {}
    for name in ("front", "middle", "back"):
        members = [layer for layer in layers if third(layer, max(layers) + 1) == name]
        if members:
            first, last = min(members), max(members)
            label = f"{name} ({first}–{last})" if first < last else f"{name} ({first})"
            thirds[label] = [u.index for u in units if u.layer in members]
    return thirds


def parts(allocation: Allocation) -> dict[str, Groups]:
    """Groupings of the units that are not empty: by matrix type, by third of the layers."""
    found = {
        "matrix type": by_type(allocation.units),
        "third of layers": by_third(allocation.units),
    }
    return {title: groups for title, groups in found.items() if groups}


def location_shares(allocation: Allocation, groups: Groups) -> np.ndarray:
    """Share of each location (groups, locations) in the run's last quarter, of all unit-steps with
    rank above 0; zeros for a group that has none."""
    track = allocation.locations
    start = allocation.end - (allocation.end - track.steps[0]) / 4
    held = track.held(start, allocation.end)
    chosen = np.stack(track.rows)
    by_unit = np.stack([held @ (chosen == index) for index in range(len(LOCATIONS))], axis=1)
    sums = np.stack([by_unit[list(group)].sum(axis=0) for group in groups.values()])
    return sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12)
