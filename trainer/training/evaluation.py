"""Loss and metrics on held-out data, independent of the number of ranks."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.saved import Saved
from trainer.checkpoint.state import load_trained
from trainer.config.config import Config
from trainer.data.dataset import TokenDataset
from trainer.data.loader import cut, packed_records
from trainer.data.micro_batches import assign_micro_batches, row_length
from trainer.distributed.world import World
from trainer.session import Session, open_session


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """Mean loss per learned token (or record) on the evaluation data, and the task's metrics.
    Collective."""
    data, records = session.held_out()
    with session.method.inference():
        parts = _forward(session, data, records)
    scores = {"eval_loss": _mean(parts)}
    metrics = session.task.scores_of_loss(scores["eval_loss"])
    guesses = {
        example: guess
        for part in parts
        for example, guess in zip(part.examples, part.predictions, strict=False)
    }
    if guesses:
        examples = sorted(guesses)
        metrics |= session.task.metrics(
            [guesses[example] for example in examples],
            data.labels_of(examples),
            data.records[examples].tolist(),
        )
    return scores | {f"eval_{name}": score for name, score in metrics.items()}


def mean_loss(
    session: Session, data: TokenDataset, records: np.ndarray, *, gradients: bool = False
) -> float:
    """Mean loss on some records; `gradients`: also accumulate its gradient in the optimizer's
    buffer, summed over ranks. Collective; all ranks run the same number of forward passes."""
    weight = int(data.weights[records].sum())
    parts = _forward(session, data, records, weight if gradients else None)
    if gradients:
        session.world.sum_(session.optimizer.gradients)
    return _mean(parts)


@dataclass(frozen=True, order=True)
class _Part:
    """Results of one micro-batch; ordered by its global index."""

    index: int
    loss: float
    weight: int
    examples: list[int]
    predictions: list[Any]


def _forward(
    session: Session, data: TokenDataset, records: np.ndarray, weight: int | None = None
) -> list[_Part]:
    """Results of all ranks' micro-batches by global index, without dropout; with `weight`, also
    gradients of loss / weight. Micro-batches and the order of sums do not depend on the number of
    ranks."""
    world, task = session.world, session.task
    parts = []
    was_training = session.model.training
    session.model.eval()
    options, rows = session.config.data, session.backbone.rows
    sequences = packed_records(np.asarray(records), data, options)
    micro_batches = cut(sequences, data, options, options.micro_batch_size, rows)
    lengths = [row_length(one, data, rows) for one in micro_batches]
    rows = rows.fitted(lengths, max(lengths))
    for index, batch in assign_micro_batches(
        micro_batches, data, task, rows, world.rank, world.size
    ):
        session.watchdog.alive(f"micro-batch {index} of an evaluation")
        batch = batch.to(world.device)
        loss, predictions = task.loss(session.model, batch)
        if weight is not None:
            session.engine.backward(loss / weight)
        guesses = predictions.tolist() if predictions is not None and batch.records else []
        parts.append(_Part(index, float(loss.detach()), batch.weight, batch.records, guesses))
    session.model.train(was_training)
    return sorted(part for parts_of_rank in world.gather(parts) for part in parts_of_rank)


def _mean(parts: list[_Part]) -> float:
    return math.fsum(part.loss for part in parts) / sum(part.weight for part in parts)


def evaluate_saved(config: Config, world: World, saved: Saved) -> dict[str, float]:
    """Scores of a checkpoint's adapters on the backbone that `config` describes. Collective."""
    unreached = saved.state.get("unreached", [])
    session = open_session(
        config, world, saved.initial_adapters, unreached, frozen=lambda _: saved.frozen
    )
    with world.all_or_none():
        load_trained(session, saved.checkpoint, saved.tensors)
    return evaluate(session)
