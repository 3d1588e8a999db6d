"""Whether what a run has trained to its last step is a result, or ruins.

A loss is judged against that of step 1, which the untrained model made, on the very same records:
neither noise between batches nor what a task's losses are like can be mistaken for divergence.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.files import METRICS
from trainer.records.jsonl import read_metrics
from trainer.session import Session
from trainer.training.evaluation import mean_loss
from trainer.training.loop import make_loader

_STEPS = 10
"""Shorter runs are not judged by their losses."""
_MARGIN, _SHARE = 0.5, 0.2
"""A loss is far above another by more than this much and this part of it."""
_ABSURD = 1e3
"""A trained value beyond it is no adapter's."""
_GROWN = 10
"""Times the largest value that spectral initialisation took out of W, where that is more."""


@torch.no_grad()
def find_fault(session: Session, folder: Path, steps: int) -> str | None:
    """What is wrong with a run that has made all its steps, None if nothing is; the same on every
    rank. Collective."""
    world, fault, risen = session.world, None, None
    with world.all_or_none():
        if world.is_main:
            fault = _absurd(session)
            risen = _rise(folder, steps)
    fault, risen = world.broadcast((fault, risen))
    if fault is not None or risen is None:
        return fault
    first, last = risen
    with session.watchdog, session.method.inference():
        now = mean_loss(session, session.train_data, _records_of_step_1(session))
    if not _far_above(now, first):
        return None
    rate = session.config.optim.learning_rate
    return (
        f"loss {first:.4g} in step 1, {last:.4g} at the end and {now:.4g} on the records of step "
        f"1: the run diverged, with optim.learning_rate={rate:g}"
    )


def _absurd(session: Session) -> str | None:
    """The first trained tensor that holds values which are not finite, or absurd."""
    initial = session.initial_adapters or {}
    for name, adapter in session.method.adapters.items():
        for role in ("A", "B", *(["g"] if adapter.g.requires_grad else [])):
            limit = _ABSURD
            if name in initial:
                began = getattr(initial[name].adapter, role)
                limit = max(limit, _GROWN * _largest(began))
            if (found := _beyond(getattr(adapter, role), limit)) is not None:
                return f"{role} of {name} {found}"
    for name, parameter in session.method.trained_parameters.items():
        if (found := _beyond(parameter, _ABSURD)) is not None:
            return f"{name} {found}"
    for path, head in session.backbone.heads.items():
        for parameter_name, parameter in head.named_parameters():
            if (found := _beyond(parameter, _ABSURD)) is not None:
                return f"{path}.{parameter_name.removeprefix('inner.')} {found}"
    for path, rows in session.backbone.token_rows.items():
        if (found := _beyond(rows.values, _ABSURD)) is not None:
            return f"the table of added tokens, {path}, {found}"
    return None


def _beyond(tensor: Tensor, limit: float) -> str | None:
    largest = _largest(tensor)
    if largest <= limit:
        return None
    return f"has values of {largest:.3g}" if np.isfinite(largest) else "has values not finite"


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN where one is."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _rise(folder: Path, steps: int) -> tuple[float, float] | None:
    """(loss of step 1, mean of the last quarter of those logged), where that is far above it."""
    logged = [line for line in read_metrics(folder / METRICS) if line.get("loss") is not None]
    if steps < _STEPS or len(logged) < 2 or logged[0]["step"] != 1:
        return None
    losses = [line["loss"] for line in logged[1:]]
    last = float(np.mean(losses[-max(1, len(losses) // 4) :]))
    return (logged[0]["loss"], last) if _far_above(last, logged[0]["loss"]) else None


def _far_above(loss: float, other: float) -> bool:
    return not loss <= other + max(_MARGIN, _SHARE * abs(other))


def _records_of_step_1(session: Session) -> np.ndarray:
    sequences = make_loader(session, session.world).sequences(0)
    return np.concatenate(sequences[: session.config.data.batch_size])
