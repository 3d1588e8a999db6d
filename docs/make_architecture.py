"""Draw docs/architecture.png: a sharded backbone of packed bytes, and replicated adapters.

python docs/make_architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
BYTES, ADAPTER, DECISION, PLAIN = "#cfe2f7", "#ffe0b8", "#d8efd3", "white"
RANKS = 3
LEFT, STRIDE, WIDTH = 2.4, 3.5, 3.1
"""Of the columns that stand for ranks."""


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str
) -> None:
    """A labelled box, (x, y) its lower left corner."""
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=colour, ec="0.3", lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>"
) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=12, color="0.3"))


def packed(axes: Axes, y: float) -> None:
    """One frozen matrix: quantised into one flat tensor, which the engine splits over the ranks."""
    columns = LEFT + (RANKS - 1) * STRIDE + WIDTH
    box(axes, LEFT, y, WIDTH, 0.8, "frozen W, bfloat16", PLAIN)
    axes.text(LEFT + WIDTH + 0.2, y + 0.95, "pack", ha="center", fontsize=9, color="0.3")
    arrow(axes, (LEFT + WIDTH, y + 0.4), (LEFT + STRIDE, y + 0.4))
    middle = columns - 1.4
    box(axes, LEFT + STRIDE, y, middle - LEFT - STRIDE, 0.8,
        "codes: one flat parameter in the model's dtype", BYTES)  # fmt: skip
    box(axes, middle, y, columns - middle, 0.8, "scales", BYTES)
    for index in range(RANKS):  # each third of the bytes, to its rank
        third = LEFT + STRIDE + (columns - LEFT - STRIDE) * (2 * index + 1) / (2 * RANKS)
        arrow(axes, (third, y), (LEFT + index * STRIDE + WIDTH / 2, 5.3))


def rank(axes: Axes, index: int) -> None:
    """What one rank holds."""
    x, middle = LEFT + index * STRIDE, LEFT + index * STRIDE + WIDTH / 2
    axes.text(middle, 4.98, f"rank {index}", ha="center", fontsize=11, weight="bold")
    box(axes, x, 4.0, WIDTH, 0.8, f"bytes {index + 1}/{RANKS}", BYTES)
    box(axes, x, 2.45, WIDTH, 0.95, "A, g, B, mask\nAdamW moments", ADAPTER)
    text = "decide → Decision" if index == 0 else "apply the same Decision"
    box(axes, x, 1.05, WIDTH, 0.8, text, DECISION)
    arrow(axes, (middle, 1.85), (middle, 2.45))
    if index:
        before = x - STRIDE + WIDTH
        for y in (4.4, 2.92):
            arrow(axes, (before, y), (x, y), style="<|-|>")
        arrow(axes, (before, 1.45), (x, 1.45))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    packed(axes, 5.75)
    for index in range(RANKS):
        rank(axes, index)
    for y, text in (
        (6.15, "each matrix:\nquantised to bytes"),
        (4.4, "backbone:\nsharded, gathered\nblock by block\n(ZeRO-3, FSDP2, peer)"),
        (2.92, "adapters:\nreplicated,\ngradients summed"),
        (1.45, "method: rank 0 decides,\nbroadcast, verified\nby digest"),
    ):
        axes.text(2.1, y, text, ha="right", va="center", fontsize=10)
    formula = r"$y = W\,x + \mathrm{bias} + B\,\mathrm{diag}(g)\,A\,x$"
    after = "the mask says which components train;  export: a plain LoRA"
    axes.text(LEFT, 0.45, f"{formula}      {after}", fontsize=11)
    axes.set_xlim(-0.9, 12.6)
    axes.set_ylim(0.2, 6.9)
    axes.axis("off")
    figure.savefig(HERE / "architecture.png", dpi=110)


if __name__ == "__main__":
    main()
