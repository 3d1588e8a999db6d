"""Figures of one run, finished or interrupted, and comparisons of several."""

import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from adapters.figures import Curves, UnitScores
from adapters.figures import Figure as Declared
from adapters.methods.registry import METHODS
from trainer.config.aliases import rename_keys
from trainer.config.yaml import parse_yaml
from trainer.errors import UserError
from trainer.files import CONFIG, FIGURES, METRICS, write_text
from trainer.records.jsonl import final_scores, read_metrics
from trainer.report.allocation_history import Allocation, read_allocation
from trainer.report.allocation_plots import (
    draw_locations,
    draw_ranks,
    draw_ranks_by_type,
    draw_scores,
    draw_survivors,
)
from trainer.report.loss_curve import curve_of, draw_loss, loss_figure
from trainer.report.page import page
from trainer.report.training_plots import draw_optimizer

SCORES = {
    "eval_accuracy": "held-out accuracy",
    "eval_matthews": "held-out Matthews correlation",
    "eval_pearson": "held-out Pearson correlation",
    "eval_loss": "held-out loss (nats per learned token or record)",
}
"""Scores to compare runs by: the one that most of them have, on a tie the first."""


@dataclass(frozen=True)
class Run:
    """Contents of a run folder. `name` is unique within a report."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    allocation: Allocation | None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a scalar, without non-finite values."""
        found = [(e["step"], e[key]) for e in self.metrics if isinstance(e.get(key), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def numbers(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one of the method's scalars, else of a number in its decisions."""
        found = self.series(f"method/{key}")
        if not found[0] and self.allocation is not None and key in self.allocation.numbers:
            track = self.allocation.numbers[key]
            found = list(track.steps), [float(row[0]) for row in track.rows]
        return found

    @property
    def declared(self) -> Sequence[Declared]:
        """The figures that the run's method declares; none for an unknown method."""
        kind = self.config["method"].get("kind")
        return METHODS[kind].figures if isinstance(kind, str) and kind in METHODS else ()

    @property
    def active_parameters(self) -> float:
        """Mean over the logged steps; NaN where none was logged."""
        values = self.series("active_parameters")[1]
        return float(np.mean(values)) if values else float("nan")

    def score(self, key: str) -> float | None:
        """A metric of the last evaluation, or of the best one where the run keeps it; None where it
        is missing or not finite."""
        return final_scores(self.metrics).get(key)


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError naming what is missing or broken in it."""
    file = folder / CONFIG
    if not file.is_file():
        problem = "no config.yaml in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; accepted: a run folder")
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; accepted: the file that a run wrote") from error
    sections = ("run", "method")
    if not isinstance(config, dict) or any(not isinstance(config.get(s), dict) for s in sections):
        raise UserError(f"{file}: no section run or method; accepted: the file that a run wrote")
    rename_keys(config)
    metrics = read_metrics(folder / METRICS)
    end = metrics[-1]["step"] if metrics else 0
    allocation = read_allocation(folder, config["method"].get("rank", np.nan), end)
    folder = folder.resolve()
    return Run(folder, folder.name, config, metrics, allocation)


def report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw all figures that the runs have data for into `out`, as PNG and SVG; returns the PNGs.

    One run: its own figures, by default into its folder. Several: figures that compare them.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    if out is None and len(folders) > 1:
        raise UserError(f"--out: not given with {len(folders)} runs; accepted: a folder")
    runs = _with_unique_names([read_run(folder) for folder in folders])
    out = out or folders[0] / FIGURES
    written = []
    try:
        if has_loss(runs):
            written.append(draw_loss([run.folder for run in runs], out / "loss"))
        written += save_figures(run_figures(runs[0]) if len(runs) == 1 else comparisons(runs), out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    if not written:
        raise UserError(
            f"{', '.join(map(str, folders))}: nothing logged yet; accepted: a run with metrics"
        )
    return written


def save_figures(figures: Iterable[tuple[str, Figure]], out: Path) -> list[Path]:
    """Write (file name, figure) as PNG and SVG; returns the PNGs. Raises OSError."""
    written = []
    for name, figure in figures:
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("svg", "png"):
            figure.savefig(out / f"{name}.{suffix}", dpi=120)
        written.append(out / f"{name}.png")
    return written


def draw_run(folder: Path) -> list[Path]:
    """The figures of a run but for its loss, into its folder. Raises UserError."""
    return save_figures(run_figures(read_run(folder)), folder / FIGURES)


def write_page(folder: Path, file: Path) -> None:
    """The report of a run as one HTML page (`trainer/report/page.py`). Raises UserError."""
    run = read_run(folder)
    if not run.metrics:
        raise UserError(f"{folder}: nothing logged yet; accepted: a run with metrics")
    figures = itertools.chain(
        [("loss", loss_figure([curve_of(run.name, run.metrics)]))] if has_loss([run]) else [],
        run_figures(run),
    )
    text = page(run.folder, run.name, run.config, run.metrics, figures)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({error.strerror})") from error


def has_loss(runs: Sequence[Run]) -> bool:
    """Whether any of them logged a loss."""
    return any(run.series(key)[0] for run in runs for key in ("loss", "eval_loss"))


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the parent folder's name as a prefix where names are not unique."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.folder.parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def run_figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of everything that a single run has data for."""
    optimizer = draw_optimizer(run.metrics, run.name)
    if optimizer is not None:
        yield "optimizer", optimizer
    allocation = run.allocation
    if allocation is not None and allocation.ranks.steps:
        yield "ranks", draw_ranks(allocation, run.name)
        yield "ranks_by_type", draw_ranks_by_type(allocation, run.name)
    if allocation is not None and allocation.locations.steps:
        yield "locations", draw_locations(allocation, run.name)
    if allocation is not None and allocation.survivors is not None:
        yield "survivors", draw_survivors(allocation, run.name)
    for declared in run.declared:
        if isinstance(declared, UnitScores):
            if allocation is not None and declared.key in allocation.scores:
                yield declared.key, draw_scores(allocation, declared, run.name)
        elif run.numbers(declared.leading)[0]:
            yield declared.name, draw_curves(run, declared)


def comparisons(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of every comparison that several runs have data for."""
    measured = [run for run in runs if run.active_parameters > 0]
    scored = {key: [run for run in measured if run.score(key) is not None] for key in SCORES}
    best = max(SCORES, key=lambda key: len(scored[key]))
    if len(scored[best]) > 1:
        yield "accuracy_vs_parameters", draw_accuracy_vs_parameters(scored[best], best)
    selected = [run for run in runs if survivors(run) is not None]
    if len(selected) > 1:
        yield "stability", draw_stability(selected)


def draw_curves(run: Run, declared: Curves) -> Figure:
    """Scalars over steps, as a method declares them."""
    drawn = {}
    for ylabel, keys in declared.panels.items():
        series = {label: run.numbers(key) for label, key in keys.items()}
        if any(steps for steps, _ in series.values()):
            drawn[ylabel] = {label: found for label, found in series.items() if found[0]}
    figure = Figure(figsize=(8, 1.2 + 2.3 * len(drawn)), layout="constrained")
    every = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (ylabel, series) in zip(every, drawn.items(), strict=True):
        for label, (steps, values) in series.items():
            axes.plot(steps, values, lw=1.2, marker="." if len(steps) <= 50 else "", label=label)
        if ylabel not in declared.signed:
            axes.set_ylim(0, 1.08 * max(0.1, *(max(values) for _, values in series.values())))
        axes.set_ylabel(textwrap.fill(ylabel, 24))
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
    every[-1].set_xlabel("optimizer step")
    every[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle(f"{declared.title} of {run.name}")
    return figure


def same_but_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs with equal configuration, except for seed, name and folder."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = {k: v for k, v in run.config["run"].items() if k not in ("seed", "name", "dir")}
        key = json.dumps({**run.config, "run": rest}, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def draw_accuracy_vs_parameters(runs: Sequence[Run], score: str) -> Figure:
    """`score` at the end against mean active parameters, one point per configuration.

    Runs that differ only by seed are one point, with their standard deviation.
    """
    groups = same_but_seed(runs)
    figure = Figure(figsize=(9, max(4.5, 1.5 + 0.25 * len(groups))), layout="constrained")
    axes = figure.subplots()
    for index, group in enumerate(groups):
        found = np.array([[run.active_parameters, run.score(score)] for run in group])
        x, y = found.mean(axis=0)
        deviation = found.std(axis=0, ddof=1) if len(group) > 1 else (None, None)
        axes.errorbar(
            x, y, xerr=deviation[0], yerr=deviation[1], capsize=3, ms=8, alpha=0.85,
            fmt="osD^vP*X<>"[index % 10], color=f"C{(index + index // 10) % 10}",
            label=_group_name(group),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="mean active parameters (log scale)", ylabel=SCORES[score])
    axes.set_title(f"{SCORES[score].split(' (')[0].capitalize()} against active parameters")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _group_name(group: Sequence[Run]) -> str:
    if len(group) == 1:
        return group[0].name
    common = re.sub(r"[-_. ]+(seed|s)?[-_]?\d+$", "", group[0].name)
    return f"{common} ({len(group)} seeds)"


def survivors(run: Run) -> frozenset[str] | None:
    """Names of the units that a selection (WeightLoRA) kept; None if there was none (yet)."""
    return run.allocation.survivors if run.allocation is not None else None


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|, in [0, 1]; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def draw_stability(runs: Sequence[Run]) -> Figure:
    """Pairwise similarity of the runs' survivors (WeightLoRA Fig. 5)."""
    chosen = [survivors(run) or frozenset() for run in runs]
    matrix = np.array([[jaccard(a, b) for b in chosen] for a in chosen])
    size = min(max(4.0, 1.5 + 0.45 * len(runs)), 12)
    figure = Figure(figsize=(size + 3, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1)
    figure.colorbar(image, label="Jaccard similarity of survivors")
    ticks = range(len(runs))
    axes.set_xticks(ticks, [str(index) for index in ticks])
    axes.set_yticks(ticks, [f"{run.name}  {index}" for index, run in enumerate(runs)])
    if len(runs) <= 16:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    pairs = matrix[np.triu_indices(len(runs), 1)]
    title = f"Survivors that runs share: mean {pairs.mean():.2f}, least {pairs.min():.2f}"
    axes.set(xlabel="run, numbered as on the left", ylabel="run", title=title)
    return figure
