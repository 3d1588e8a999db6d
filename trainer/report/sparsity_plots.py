"""Figures of the sparsity of ΔW by layer (La-LoRA, Figs. 1 and 4), computed by
`trainer/run/sparsity.py`. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LABEL = "sparsity of ΔW (eq. 1)"


@dataclass(frozen=True)
class Sparsity:
    """Of the layers of a run, at its checkpoints."""

    layers: Sequence[str]
    steps: Sequence[int]
    values: np.ndarray
    """(checkpoints, layers): log of the share of entries with |ΔW| < ε, over ε; NaN where no entry
    is that small."""
    ranks: np.ndarray
    """(layers): mean number of components per unit at the last checkpoint."""


def draw_sparsity(sparsity: Sparsity, name: str) -> Figure:
    """Sparsity of each layer over steps (Fig. 1)."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 1, len(sparsity.layers)))
    for label, values, colour in zip(sparsity.layers, sparsity.values.T, colours, strict=True):
        axes.plot(sparsity.steps, values, color=colour, lw=1.2, marker=".", label=label)
    axes.set(xlabel="optimizer step", ylabel=LABEL, title=f"Sparsity by layer of {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    columns = -(-len(sparsity.layers) // 20)
    axes.legend(
        title="layer", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, ncols=columns
    )
    return figure


def draw_sparsity_and_rank(sparsity: Sparsity, name: str) -> Figure:
    """Final sparsity of each layer as a line over its rank as bars (Fig. 4)."""
    figure = Figure(figsize=(max(6.0, 2 + 0.3 * len(sparsity.layers)), 4.2), layout="constrained")
    bars = figure.subplots()
    places = np.arange(len(sparsity.layers))
    bars.bar(places, sparsity.ranks, color="C0", alpha=0.6)
    bars.set_xticks(places, sparsity.layers)
    bars.set(xlabel="transformer layer", ylabel="rank (components)")
    line = bars.twinx()
    line.plot(places, sparsity.values[-1], color="C3", marker="o")
    line.set_ylabel(LABEL)
    line.yaxis.label.set_color("C3")
    bars.set_title(f"Sparsity and rank at step {sparsity.steps[-1]} of {name}")
    return figure
