"""Loss curves from the metrics of runs."""

from collections.abc import Sequence
from pathlib import Path

from trainer.files import METRICS
from trainer.records.jsonl import read_metrics


def draw_loss(runs: Sequence[Path], target: Path) -> Path:
    """Training and evaluation loss over steps of one or several runs, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        lines = read_metrics(run / METRICS)
        trained = [(e["step"], e["loss"]) for e in lines if e.get("loss") is not None]
        evaluated = [(e["step"], e["eval_loss"]) for e in lines if e.get("eval_loss") is not None]
        name = "" if len(runs) == 1 else f"{run.name}: "
        colour = None
        if trained:
            (line,) = axes.plot(
                *zip(*trained, strict=True), lw=1, alpha=0.8, label=f"{name}training"
            )
            colour = line.get_color() if len(runs) > 1 else None
        if evaluated:
            axes.plot(
                *zip(*evaluated, strict=True), "o--", ms=5, color=colour, label=f"{name}held-out"
            )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token or record)")
    axes.set_title(f"Loss of {runs[0].name}" if len(runs) == 1 else "Loss of several runs")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.has_data() and len(runs) <= 4:
        axes.legend()
    elif axes.has_data():  # outside the plot, which many names would cover
        figure.set_size_inches(10, max(4, 0.35 * len(runs)))
        figure.legend(loc="outside right upper", fontsize="x-small")
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(target.with_suffix(suffix), dpi=120)
    plt.close(figure)
    return target.with_suffix(".png")
