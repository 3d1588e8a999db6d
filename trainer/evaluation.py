"""Loss and metrics on held-out data, the same whatever the number of ranks."""

import math
from pathlib import Path

import numpy as np
import torch

from trainer import checkpoint as checkpoints
from trainer import checkpoint_files
from trainer.config import Config
from trainer.distributed import World
from trainer.loader import deal
from trainer.session import Session, open_session


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """Mean loss per learned token (or record) over all evaluation data, and the task's metrics.

    Per-batch sums are gathered and added in record order in float64, so that the figure does not
    depend on how many ranks shared the work.
    """
    data, world, task = session.eval_data, session.world, session.task
    assert data is not None
    sequences = list(np.arange(len(data))[:, None])
    parts: list[tuple[int, float, int, list[int], list[float]]] = []
    was_training = session.model.training
    session.model.eval()
    size = session.config.data.micro_batch_size
    for index, batch in deal(sequences, data, task, size, world.rank, world.size):
        batch = batch.to(world.device)
        loss, predictions = task.loss(session.model, batch)
        guesses = predictions.tolist() if predictions is not None and batch.records else []
        parts.append((index, float(loss), batch.weight, batch.records, guesses))
    session.model.train(was_training)
    everyone = sorted(part for parts_of_rank in world.gather(parts) for part in parts_of_rank)
    weight = sum(part[2] for part in everyone)
    mean = math.fsum(part[1] for part in everyone) / weight
    scores = {"eval_loss": mean}
    if session.config.task.kind == "causal_lm":
        scores["eval_perplexity"] = math.exp(min(mean, 700.0))
    guesses = [guess for part in everyone for guess in part[4]]
    if guesses:
        labels = [float(data.labels[record]) for part in everyone for record in part[3]]
        scores |= {f"eval_{name}": score for name, score in task.metrics(guesses, labels).items()}
    return scores


def evaluate_saved(config: Config, world: World, checkpoint: Path) -> dict[str, float]:
    """Scores of a checkpoint's adapters on the backbone that `config` describes."""
    session = open_session(config, world)
    with world.together():
        stored = checkpoint_files.read_tensors(checkpoint)
        checkpoints.load_trained(session, checkpoint, stored)
    return evaluate(session)
