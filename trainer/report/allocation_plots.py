"""Figures of a run's decisions."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from adapters.banks import LOCATIONS
from adapters.figures import UnitScores
from adapters.unit import Unit
from trainer.report.allocation_history import (
    Allocation,
    by_layer,
    by_type,
    location_shares,
    parts,
)

HEAT_MAP_SPANS = 240
LINE_SPANS = 30
"""Maximum number of spans of steps in a figure; more decisions are averaged. Lines need fewer:
LeLoRA samples its ranks, and the noise of a dozen curves would hide their trend."""


def draw_ranks(allocation: Allocation, name: str) -> Figure:
    """Heat map of the mean rank of each layer's units over steps."""
    layers = by_layer(allocation.units)
    edges, means = allocation.ranks.spans(layers, allocation.end, HEAT_MAP_SPANS)
    height = min(max(3.2, 1.6 + 0.11 * len(layers)), 10)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    top = max(1.0, float(np.nanmax(means, initial=0)))
    rows = np.arange(len(layers) + 1) - 0.5
    # Rasterised in the SVG: as vectors, 80 layers make a file too large for viewers.
    mesh = axes.pcolormesh(edges, rows, means, vmin=0, vmax=top, rasterized=True)
    figure.colorbar(mesh, label="rank (components)", aspect=4 * height)
    labels = list(layers)
    ticks = list(range(0, len(labels), -(-len(labels) // 32)))
    if labels[-1] == "other":  # always labelled, clear of the label above it
        ticks = [tick for tick in ticks if tick < len(labels) - len(labels) // 32 - 1]
        ticks.append(len(labels) - 1)
    axes.set_yticks(ticks, [labels[tick] for tick in ticks])
    axes.invert_yaxis()
    axes.set(xlabel="optimizer step", ylabel="transformer layer", title=f"Rank by layer of {name}")
    return figure


def draw_ranks_by_type(allocation: Allocation, name: str) -> Figure:
    """Mean rank by matrix type, and by third of the layers, over steps (LeLoRA Fig. 3 c, d)."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    shown = parts(allocation)
    every = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (title, groups) in zip(every, shown.items(), strict=True):
        edges, means = allocation.ranks.spans(groups, allocation.end, LINE_SPANS)
        for index, (label, values) in enumerate(zip(groups, means, strict=True)):
            # Styles differ too: groups that share their rank lie on top of one another.
            style = ("-", "--", "-.", ":")[index % 4]
            axes.stairs(
                values, edges, baseline=None, label=label, color=f"C{index % 10}", ls=style, lw=1.5
            )
        axes.set(xlabel="optimizer step", title=f"by {title}", xlim=(edges[0], edges[-1]))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    every[0].set_ylabel("mean rank (components)")
    every[0].set_ylim(bottom=0)
    figure.suptitle(f"Mean rank of {name}")
    return figure


def draw_locations(allocation: Allocation, name: str) -> Figure:
    """Shares of the locations by matrix type and by third of the layers (LeLoRA Fig. 3 a, b)."""
    shown = parts(allocation)
    sizes = [len(groups) for groups in shown.values()]
    figure = Figure(figsize=(8, 2 + 0.32 * sum(sizes)), layout="constrained")
    every = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (title, groups) in zip(every, shown.items(), strict=True):
        shares = location_shares(allocation, groups)
        left = np.zeros(len(groups))
        for index, location in enumerate(LOCATIONS):
            axes.barh(range(len(groups)), shares[:, index], left=left, label=location)
            left += shares[:, index]
        for row in np.flatnonzero(left == 0):
            axes.text(0.5, row, "rank 0 throughout", ha="center", va="center", color="grey")
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(ylabel=title, xlim=(0, 1))
        axes.invert_yaxis()
    every[-1].xaxis.set_major_formatter(PercentFormatter(1))
    every[-1].set_xlabel("share of the steps with rank above 0")
    figure.align_ylabels()
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LOCATIONS), frameon=False)
    figure.suptitle(f"Location in the last quarter of {name}")
    return figure


def draw_scores(allocation: Allocation, declared: UnitScores, name: str) -> Figure:
    """Difference of a score from its neutral value: by unit at the last record, and over steps.

    A unit whose score was set to 0 has a tick instead, and its line ends: its difference would
    compress the scale of the others.
    """
    track, units, symbol = allocation.scores[declared.key], allocation.units, declared.symbol
    steps, scores = track.steps, np.stack(track.rows)
    change = np.where(scores == 0, np.nan, scores - declared.neutral)
    labels, kept = (f"{symbol} > 0", f"{symbol} < 0", f"{symbol} = 0"), scores[-1] > 0
    if allocation.survivors is not None:
        labels = ("survivor", "removed", f"removed, {symbol} = 0")
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
    zeroed = np.flatnonzero(scores[-1] == 0)
    if len(zeroed):
        low = np.full(len(zeroed), 0.03)  # of the height
        rug, width = top.get_xaxis_transform(), 1.5 * thin
        top.plot(zeroed, low, "|", transform=rug, color="C3", ms=7, mew=width, label=labels[2])
    for axes in (top, bottom):
        axes.axhline(0, color="black", lw=0.6)
        axes.margins(y=0.1)
        axes.grid(alpha=0.3, axis="y")
        axes.set_ylabel(f"{symbol} − {declared.neutral:g}" if declared.neutral else symbol)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _name_units(top, units)
    top.set_title(f"at step {steps[-1]}, the last recorded")
    bottom.set(xlabel="optimizer step", title=f"over steps; lines end where {symbol} was set to 0")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{declared.title} of the units of {name}")
    return figure


def _name_units(axes: Axes, units: Sequence[Unit]) -> None:
    """Label the units of a bar chart: by name, or if there are many, the first of each layer."""
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


def draw_survivors(allocation: Allocation, name: str) -> Figure:
    """Which units a selection kept, by layer and matrix type; of experts, the share of them."""
    units, survivors = allocation.units, allocation.survivors or frozenset()
    layers, types = by_layer(units), by_type(units)
    kept = np.full((len(layers), len(types)), np.nan)
    for (row, of_layer), (column, of_type) in itertools.product(
        enumerate(layers.values()), enumerate(types.values())
    ):
        both = set(of_layer) & set(of_type)
        if both:
            kept[row, column] = np.mean([units[index].name in survivors for index in both])
    height = min(max(3.0, 1.8 + 0.2 * len(layers)), 12)
    figure = Figure(figsize=(2.5 + 0.6 * len(types), height), layout="constrained")
    axes = figure.subplots()
    axes.imshow(kept, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_facecolor("0.9")  # no such unit
    axes.set_xticks(range(len(types)), list(types), rotation=45, ha="right")
    shown = list(range(0, len(layers), -(-len(layers) // 32)))
    axes.set_yticks(shown, [list(layers)[index] for index in shown])
    axes.set_xticks(np.arange(len(types) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel="matrix type", ylabel="transformer layer")
    count = sum(unit.name in survivors for unit in units)
    axes.set_title(f"Survivors of {name}: {count} of {len(units)} (dark)")
    return figure
