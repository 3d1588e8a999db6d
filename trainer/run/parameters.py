"""Parameters that a run has trained, touched and would export."""

from dataclasses import dataclass

import torch

from adapters.factors import lora_factors, parts_by_unit
from adapters.gated import GatedAdapter
from trainer.session import Session


@dataclass(frozen=True)
class Parameters:
    """Numbers of scalars. Heads and rows of added tokens are counted in `others` alone."""

    touched: int
    """Of components of the adapters at the end that any step has changed."""
    exported: int
    """Of the LoRA that the run exports."""
    others: int
    """Trained beside adapters."""


@torch.no_grad()
def count_parameters(session: Session) -> Parameters:
    """Counts at the end of a run. A method without adapters of the project's own touches and
    exports all that it trains."""
    method, size = session.method, session.optimizer.numel
    if session.config.method.trains != "adapters":
        return Parameters(size, size, 0)
    width = {unit.name: unit.in_features + unit.out_features for unit in method.units}
    initial = {n: one.adapter for n, one in (session.initial_adapters or {}).items()}
    touched = sum(
        _changed(adapter, initial.get(name) if method.splits_weight else None) * width[name]
        for name, adapter in method.adapters.items()
    )
    with method.inference():
        parts = parts_by_unit(
            method.adapters, initial, session.frozen, splits_weight=method.splits_weight
        )
        exported = sum(
            lora_factors(part.adapter, part.initial)[0].shape[0] * width[name]
            for name, of_unit in parts.items()
            for part in of_unit
        )
    others = sum(p.numel() for p in method.trained_parameters.values())
    others += session.backbone.row_parameters
    others += sum(p.numel() for head in session.backbone.heads.values() for p in head.parameters())
    return Parameters(touched, exported, others)


def _changed(adapter: GatedAdapter, initial: GatedAdapter | None) -> int:
    """Components that differ from the initial ones; without these, whose B (0 at first) is not 0:
    an update of A alone changes nothing."""
    A, B = adapter.A.detach().cpu(), adapter.B.detach().cpu()
    changed = (B != 0).any(1)
    if initial is not None:
        count = len(initial.A)
        A0, B0 = initial.A.detach().cpu(), initial.B.detach().cpu()
        changed[:count] = (A[:count] != A0).any(1) | (B[:count] != B0).any(1)
    return int(changed.sum())
