"""Sparsity of a run's ΔW by layer, from its checkpoints (La-LoRA, eq. 1):

    spa = log( Σ_{m,n} 1[|P_mn| < ε] / (ε · m · n) ),        ε = 1e-4

with P the increments ΔW of all adapted matrices of a layer together. The equation compares P itself
with ε; here its absolute value, or half of all entries would be small whatever their size.
A matrix whose adapter was removed has ΔW = 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.unit import Unit
from trainer.checkpoint.store import complete, read_tensors
from trainer.config.config import load_config
from trainer.errors import UserError
from trainer.files import CHECKPOINTS, CONFIG, FIGURES, UNITS
from trainer.report.allocation_history import by_layer, read_units
from trainer.report.sparsity_plots import Sparsity, draw_sparsity, draw_sparsity_and_rank

EPSILON = 1e-4


def small_entries(delta: Tensor, epsilon: float = EPSILON) -> int:
    """Number of entries of ΔW (out, in) with |ΔW| < ε."""
    return int((delta.abs() < epsilon).sum())


def read_sparsity(folder: Path) -> Sparsity:
    """Sparsity of every layer at every checkpoint of a run folder. Raises UserError."""
    checkpoints = complete(folder / CHECKPOINTS)
    if not checkpoints:
        raise UserError(f"{folder}: no checkpoint in it; accepted by --sparsity: a run with some")
    method = load_config(folder / CONFIG).method
    if method.trains != "adapters" or method.takes_from_weight:
        raise UserError(
            f"{folder}: trained by {method.kind}; accepted by --sparsity: methods whose adapters "
            "start at 0"
        )
    units = read_units(folder / UNITS)
    layers = by_layer(units)
    values, ranks = [], np.zeros(len(layers))
    for checkpoint in checkpoints:
        tensors = read_tensors(checkpoint)
        held = [_of_layer(tensors, [units[i] for i in indices]) for indices in layers.values()]
        values.append([sparsity for sparsity, _ in held])
        ranks = np.array([rank for _, rank in held])
    steps = [int(checkpoint.name.removeprefix("step-")) for checkpoint in checkpoints]
    return Sparsity(list(layers), steps, np.array(values), ranks)


def _of_layer(tensors: Mapping[str, Tensor], units: Sequence[Unit]) -> tuple[float, float]:
    """(sparsity, mean rank) of a layer."""
    small = rank = 0
    for unit in units:
        parts = [tensors.get(f"adapter/{unit.name}/{part}") for part in ("A", "g", "B", "mask")]
        if any(part is None for part in parts):
            small += unit.out_features * unit.in_features
            continue
        A, g, B, mask = (part for part in parts if part is not None)
        small += small_entries(GatedAdapter(A, g, B).delta())
        rank += int(mask.sum())
    entries = sum(unit.out_features * unit.in_features for unit in units)
    share = small / (EPSILON * entries)
    return float(np.log(share)) if small else float("nan"), rank / len(units)


def report_sparsity(folder: Path, out: Path | None = None) -> list[Path]:
    """Draw Figs. 1 and 4 of a run into `out`, by default its own figures; returns the PNGs."""
    sparsity, written = read_sparsity(folder), []
    out = out or folder / FIGURES
    name = folder.resolve().name
    for stem, draw in (
        ("sparsity", draw_sparsity),
        ("sparsity_and_rank", draw_sparsity_and_rank),
    ):
        figure = draw(sparsity, name)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for suffix in ("svg", "png"):
                figure.savefig(out / f"{stem}.{suffix}", dpi=120)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
        written.append(out / f"{stem}.png")
    return written
