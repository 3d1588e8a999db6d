"""Figures of the optimizer's course: learning rate and gradient norm."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_PANELS = {"learning_rate": "learning rate", "grad_norm": "gradient norm\n(before clipping)"}


def draw_optimizer(lines: Sequence[Mapping[str, Any]], name: str) -> Figure | None:
    """Learning rate and gradient norm over steps; None where neither was logged. A norm's axis is
    logarithmic: a single spike would flatten the rest."""
    drawn = {}
    for key, label in _PANELS.items():
        found = [(e["step"], e[key]) for e in lines if isinstance(e.get(key), int | float)]
        if found:
            drawn[key] = (label, found)
    if not drawn:
        return None
    figure = Figure(figsize=(8, 1.2 + 2 * len(drawn)), layout="constrained")
    every = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, (label, found)) in zip(every, drawn.items(), strict=True):
        axes.plot(*zip(*found, strict=True), lw=1.2, marker="." if len(found) <= 50 else "")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if key == "grad_norm" and all(norm > 0 for _, norm in found):
            axes.set_yscale("log")
        elif key == "learning_rate":
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    every[-1].set_xlabel("optimizer step")
    figure.suptitle(f"Learning rate and gradient norm of {name}")
    return figure
