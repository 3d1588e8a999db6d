"""What a run decided (units.json, allocation.jsonl), and figures of it.

A decision holds until the next one, so every mean over time weighs it by the steps it held.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from adapters.units import Unit, third
from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.records.jsonl import decision_files, read_objects

LOCATIONS = ("primary", "medium", "minor")
HEAT_MAP_SPANS = 240
LINE_SPANS = 30
"""Figures show at most so many spans of steps; more decisions are averaged. Lines need fewer:
LeLoRA draws its ranks, and the noise of a dozen curves hides where they go."""

Groups = Mapping[str, Sequence[int]]
"""Indices of units by the label of what they have in common."""


@dataclass
class Track:
    """One value a unit and decision: `rows[i]` (units) holds from `steps[i]` to `steps[i + 1]`."""

    steps: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, step: int, row: np.ndarray) -> None:
        while self.steps and self.steps[-1] >= step:  # a resumed run decided them again
            self.steps.pop(), self.rows.pop()
        self.steps.append(step)
        self.rows.append(row)

    def held(self, start: float, end: int) -> np.ndarray:
        """Steps between `start` and `end` for which each decision held (decisions)."""
        return np.diff(np.clip([*self.steps, end], start, end))

    def spans(self, groups: Groups, end: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges (columns + 1) in steps, and means (groups, columns) between them.

        A column is a decision; or, of more than `most`, one of as many equal spans of steps.
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

    Locations are indices of LOCATIONS, -1 where the rank is 0; ω is NaN where it is not recorded.
    """

    units: list[Unit]
    ranks: Track = field(default_factory=Track)
    locations: Track = field(default_factory=Track)
    omega: Track = field(default_factory=Track)
    survivors: frozenset[str] | None = None
    end: int = 0

    @cached_property
    def names(self) -> set[str]:
        """What a decision may name: units, layers, `all`."""
        return {"all", *(u.name for u in self.units), *(str(u.layer) for u in self.units)}


def read_allocation(folder: Path, rank: float, end: int) -> Allocation | None:
    """The decisions recorded in a run folder; None where there are none.

    `rank` is what units have until survivors are chosen, `end` the last step that was logged.
    """
    allocation: Allocation | None = None
    for file in decision_files(folder):
        for number, decision in enumerate(read_objects(file), 1):
            allocation = allocation or Allocation(read_units(folder / "units.json"), end=end)
            try:
                _take(allocation, decision, rank)
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
        raise UserError(f"{file}: not a list of units; accepted: what a run wrote") from error
    if not units:
        raise UserError(f"{file}: no unit in it; accepted: what a run wrote")
    return units


def _take(allocation: Allocation, decision: dict[str, Any], rank: float) -> None:
    """Enter one line of allocation.jsonl."""
    step, units = decision["step"], allocation.units
    for key in ("ranks", "locations", "omega", "survivors"):
        for name in decision.get(key, ()):
            if name not in allocation.names:
                raise ValueError(f"{name} in {key}")
    allocation.end = max(allocation.end, step + 1)
    if not allocation.ranks.steps and decision.keys() & {"omega", "survivors"}:
        allocation.ranks.add(0, _row(units, {"all": rank}))
    if "survivors" in decision:
        allocation.survivors = frozenset(decision["survivors"])
        ranks = dict.fromkeys(allocation.survivors, rank)  # unless the line says more, below
        allocation.ranks.add(step, _row(units, ranks))
    if "ranks" in decision:
        allocation.ranks.add(step, _row(units, decision["ranks"]))
    if "locations" in decision:
        index = {name: LOCATIONS.index(where) for name, where in decision["locations"].items()}
        row = _row(units, index, absent=-1)
        row[_row(units, decision.get("ranks", {}), absent=1) == 0] = -1
        allocation.locations.add(step, row.astype(np.int8))
    if "omega" in decision:
        allocation.omega.add(step, _row(units, decision["omega"], absent=np.nan))


def _row(units: Sequence[Unit], values: Mapping[str, float], absent: float = 0.0) -> np.ndarray:
    """Values by unit, by layer or for `all`, as one value a unit."""
    common = values.get("all", absent)
    return np.array([values.get(u.name, values.get(str(u.layer), common)) for u in units], float)


def by_layer(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Units of each transformer block; those outside the blocks come last, as `other`."""
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


def _parts(allocation: Allocation) -> dict[str, Groups]:
    parts = {
        "matrix type": by_type(allocation.units),
        "third of layers": by_third(allocation.units),
    }
    return {what: groups for what, groups in parts.items() if groups}


def draw_ranks(allocation: Allocation, name: str) -> Figure:
    """Heat map of the mean rank of each layer's units over steps."""
    layers = by_layer(allocation.units)
    edges, means = allocation.ranks.spans(layers, allocation.end, HEAT_MAP_SPANS)
    height = min(max(3.2, 1.6 + 0.11 * len(layers)), 10)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    top = max(1.0, float(np.nanmax(means, initial=0)))
    rows = np.arange(len(layers) + 1) - 0.5
    # One image inside the SVG: as vectors, 80 layers make a file that viewers choke on.
    mesh = axes.pcolormesh(edges, rows, means, vmin=0, vmax=top, rasterized=True)
    figure.colorbar(mesh, label="rank (components)", aspect=4 * height)
    labels = list(layers)
    ticks = list(range(0, len(labels), -(-len(labels) // 32)))
    if labels[-1] == "other":  # always named, and not crowded by the layer above it
        ticks = [tick for tick in ticks if tick < len(labels) - len(labels) // 32 - 1]
        ticks.append(len(labels) - 1)
    axes.set_yticks(ticks, [labels[tick] for tick in ticks])
    axes.invert_yaxis()
    axes.set(xlabel="optimizer step", ylabel="transformer layer", title=f"Rank by layer of {name}")
    return figure


def draw_ranks_by_type(allocation: Allocation, name: str) -> Figure:
    """Mean rank by matrix type, and by third of the layers, over steps (LeLoRA Fig. 3 c, d)."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    parts = _parts(allocation)
    every = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (what, groups) in zip(every, parts.items(), strict=True):
        edges, means = allocation.ranks.spans(groups, allocation.end, LINE_SPANS)
        for index, (label, values) in enumerate(zip(groups, means, strict=True)):
            # Styles differ too: groups that share their rank lie on top of one another.
            style = ("-", "--", "-.", ":")[index % 4]
            axes.stairs(
                values, edges, baseline=None, label=label, color=f"C{index % 10}", ls=style, lw=1.5
            )
        axes.set(xlabel="optimizer step", title=f"by {what}", xlim=(edges[0], edges[-1]))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    every[0].set_ylabel("mean rank (components)")
    every[0].set_ylim(bottom=0)
    figure.suptitle(f"Mean rank of {name}")
    return figure


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


def draw_locations(allocation: Allocation, name: str) -> Figure:
    """Shares of the locations by matrix type and by third of the layers (LeLoRA Fig. 3 a, b)."""
    parts = _parts(allocation)
    sizes = [len(groups) for groups in parts.values()]
    figure = Figure(figsize=(8, 2 + 0.32 * sum(sizes)), layout="constrained")
    every = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (what, groups) in zip(every, parts.items(), strict=True):
        shares = location_shares(allocation, groups)
        left = np.zeros(len(groups))
        for index, location in enumerate(LOCATIONS):
            axes.barh(range(len(groups)), shares[:, index], left=left, label=location)
            left += shares[:, index]
        for row in np.flatnonzero(left == 0):
            axes.text(0.5, row, "rank 0 throughout", ha="center", va="center", color="grey")
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(ylabel=what, xlim=(0, 1))
        axes.invert_yaxis()
    every[-1].xaxis.set_major_formatter(PercentFormatter(1))
    every[-1].set_xlabel("share of the steps with rank above 0")
    figure.align_ylabels()
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LOCATIONS), frameon=False)
    figure.suptitle(f"Location in the last quarter of {name}")
    return figure


def draw_omega(allocation: Allocation, name: str) -> Figure:
    """ω - 1 at the end of WeightLoRA's phase 1 by unit, and on the way there by step.

    A unit that thresholding zeroed is ticked, and its line ends: beside its -1, the spread of the
    others would not be seen.
    """
    steps, omega, units = allocation.omega.steps, np.stack(allocation.omega.rows), allocation.units
    change = np.where(omega == 0, np.nan, omega - 1)
    labels, kept = ("ω > 0", "ω < 0", "ω = 0"), omega[-1] > 0
    if allocation.survivors is not None:
        labels = ("survivor", "removed", "removed, ω = 0")
        kept = np.array([unit.name in allocation.survivors for unit in units])
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    thin = 1.0 if len(units) <= 64 else 0.5
    for mask, label, colour in ((~kept, labels[1], "0.6"), (kept, labels[0], "C0")):
        where = np.flatnonzero(mask & np.isfinite(change[-1]))
        if len(where):
            top.bar(where, change[-1, where], width=0.85, color=colour, label=label)
        if mask.any():
            few = "." if len(steps) <= 50 else ""
            lines = bottom.plot(steps, change[:, mask], marker=few, ms=3, color=colour, lw=thin)
            lines[0].set_label(label)
    zeroed = np.flatnonzero(omega[-1] == 0)
    if len(zeroed):
        low = np.full(len(zeroed), 0.03)  # of the height
        rug, width = top.get_xaxis_transform(), 1.5 * thin
        top.plot(zeroed, low, "|", transform=rug, color="C3", ms=7, mew=width, label=labels[2])
    for axes in (top, bottom):
        axes.axhline(0, color="black", lw=0.6)
        axes.margins(y=0.1)
        axes.grid(alpha=0.3, axis="y")
        axes.set_ylabel("ω − 1")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _name_units(top, units)
    top.set_title(f"at step {steps[-1]}, the last recorded")
    bottom.set(xlabel="optimizer step", title="on the way there; lines end where ω was set to 0")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"Importance ω of the units of {name}")
    return figure


def _name_units(axes: Axes, units: Sequence[Unit]) -> None:
    """Ticks at the units of a bar chart: each one's name, or where layers begin if many."""
    axes.set_xlim(-1, len(units))
    if len(units) <= 64:
        types = {index: label for label, group in by_type(units).items() for index in group}
        blocks = ["" if unit.layer is None else f"{unit.layer} " for unit in units]
        labels = [f"{block}{types[unit.index]}" for block, unit in zip(blocks, units, strict=True)]
        axes.set_xticks(range(len(units)), labels, rotation=90, fontsize=7)
        axes.set_xlabel("unit (layer, matrix type)")
        return
    first = {label: min(group) for label, group in by_layer(units).items()}
    shown = list(first)[:: -(-len(first) // 24)]
    axes.set_xticks([first[label] for label in shown], shown)
    axes.set_xlabel("unit, in the order of the model (tick: first unit of the layer)")
