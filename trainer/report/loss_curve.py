"""Loss curves from the metrics of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.files import METRICS
from trainer.records.jsonl import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LATE_FROM = 20
"""Logged steps of a run whose second half is drawn by itself."""
_WINDOWS = 25
"""The mean of a curve is over this part of its length."""
_LABEL = "loss (nats per learned token or record)"


@dataclass(frozen=True)
class Curve:
    """Losses of a run over its steps."""

    name: str
    steps: np.ndarray
    training: np.ndarray
    evaluated: np.ndarray
    held_out: np.ndarray

    @property
    def end(self) -> float:
        """The last step."""
        return max([0, *self.steps[-1:], *self.evaluated[-1:]])

    @property
    def mean(self) -> np.ndarray:
        """The training loss, averaged over neighbouring steps."""
        return moving_mean(self.training, max(1, len(self.training) // _WINDOWS))


def curve_of(name: str, lines: Sequence[Mapping[str, Any]]) -> Curve:
    """The losses in the lines of a metrics.jsonl."""
    columns = []
    for key in ("loss", "eval_loss"):
        found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        columns += [np.array([step for step, _ in found]), np.array([loss for _, loss in found])]
    return Curve(name, *columns)


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` values around each, fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - (width - 1) // 2, 0)
    last = np.minimum(np.arange(len(values)) + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def loss_figure(curves: Sequence[Curve]) -> "Figure":
    """Training and held-out loss over steps; beside it the second half of the longest run, scaled
    to what happens there, which the beginning would flatten."""
    from matplotlib.figure import Figure

    late = max((len(curve.training) for curve in curves), default=0) >= _LATE_FROM
    several = len(curves) > 1
    figure = Figure(figsize=(11 if late else 7, 4), layout="constrained")
    every = figure.subplots(1, 2 if late else 1, squeeze=False, width_ratios=(3, 2)[: 1 + late])[0]
    for axes in every:
        for index, curve in enumerate(curves):
            _draw(axes, curve, index, several=several)
        axes.set(xlabel="optimizer step")
        axes.grid(alpha=0.3)
    every[0].set_ylabel(_LABEL)
    every[0].set_ylim(bottom=0)
    if late:
        _zoom(every[1], curves)
    figure.suptitle("Loss of several runs" if several else f"Loss of {curves[0].name}")
    if every[0].has_data() and len(curves) <= 4:
        every[0].legend()
    elif every[0].has_data():  # outside the plot, which many names would cover
        figure.set_size_inches(15 if late else 10, max(4, 0.35 * len(curves)))
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    return figure


def _draw(axes: "Axes", curve: Curve, index: int, *, several: bool) -> None:
    name, colour = (f"{curve.name}: ", f"C{index % 10}") if several else ("", "C0")
    if len(curve.training):
        noisy = len(curve.training) >= _LATE_FROM
        if noisy and not several:
            axes.plot(curve.steps, curve.training, color=colour, lw=0.7, alpha=0.35)
        shown = curve.mean if noisy else curve.training
        axes.plot(curve.steps, shown, color=colour, lw=1.4, label=f"{name}training")
    if len(curve.held_out):
        axes.plot(
            curve.evaluated, curve.held_out, "o--", ms=4, lw=1.2, label=f"{name}held-out",
            color=colour if several else "C1",
        )  # fmt: skip


def _zoom(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Limit to the second half, and to what the means and evaluations there span."""
    end = max(curve.end for curve in curves)
    seen = [
        *(curve.mean[curve.steps >= end / 2] for curve in curves),
        *(curve.held_out[curve.evaluated >= end / 2] for curve in curves),
    ]
    low, high = np.quantile(np.concatenate(seen), [0.0, 1.0])
    room = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(xlim=(end / 2, end * 1.01), ylim=(low - room, high + room), title="second half")


def draw_loss(runs: Sequence[Path], target: Path) -> Path:
    """The loss of one or several runs, as PNG and SVG."""
    figure = loss_figure([curve_of(run.name, read_metrics(run / METRICS)) for run in runs])
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(target.with_suffix(suffix), dpi=120)
    return target.with_suffix(".png")
