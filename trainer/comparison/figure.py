"""Figure of a comparison: score against trained parameters, beside LoRA's curve."""

from collections.abc import Sequence
from pathlib import Path

from trainer.comparison.schedule import Schedule
from trainer.comparison.table import Row


def draw(schedule: Schedule, rows: Sequence[Row], target: Path) -> None:
    """Score over trained parameters. LoRA's ranks are a curve, with the standard error over the
    seeds; the bars of other arms are the interval of their difference from the LoRA they are
    compared with. Draws nothing without runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.runs]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    curve = sorted((r for r in shown if schedule.is_lora(r.arm)), key=lambda row: row.trained)
    if curve:
        errors = [(row.spread or 0.0) / max(1, len(row.runs)) ** 0.5 for row in curve]
        sizes, means = [row.trained for row in curve], [row.mean for row in curve]
        axes.errorbar(sizes, means, errors, fmt="k.-", capsize=2, label="LoRA (± standard error)")
        for row in curve:
            name, place = f"r={schedule.jobs.rank_of(row.arm)}", (row.trained, row.mean)
            axes.annotate(name, place, (4, 4), textcoords="offset points", fontsize="x-small")
    for number, row in enumerate(r for r in shown if not schedule.is_lora(r.arm)):
        bars = None
        if (change := row.difference) is not None:
            bars = [[change.estimate - change.low], [change.high - change.estimate]]
        mark = "osD^vP*X"[number // 10 % 8]
        axes.errorbar([row.trained], [row.mean], bars, fmt=mark, color=f"C{number % 10}", capsize=3,
                      label=row.arm)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters", ylabel=schedule.jobs.comparison.score)
    axes.grid(alpha=0.3)
    title = "bars: 95 % interval of the\ndifference from LoRA"
    figure.legend(loc="outside right upper", fontsize="x-small", title=title)
    figure.savefig(target, dpi=120)
    plt.close(figure)
