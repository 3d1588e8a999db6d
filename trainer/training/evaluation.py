"""Loss and metrics on held-out data, independent of the number of ranks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.checkpoint.saved import Saved
from trainer.checkpoint.state import load_trained
from trainer.config.config import Config
from trainer.config.sections import Shown
from trainer.data.dataset import TokenDataset
from trainer.data.loader import cut, packed_records
from trainer.data.micro_batches import assign_micro_batches, row_length
from trainer.device_memory import GIB, begin_peak, peak_of_phase
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.generation.evaluation import answer_records
from trainer.model.attention import VARLEN
from trainer.model.flops import model_flops
from trainer.records.evaluation_bar import EvaluationBar
from trainer.session import Session, open_session
from trainer.tasks.chunked_cross_entropy import loss_head

_BUSY = 4e12
"""FLOPs of a forward pass that take a GPU no longer than the CPU takes to launch them."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation, the same on every rank."""

    scores: dict[str, float]
    """By name, as in metrics.jsonl."""
    answers: list[dict[str, Any]]
    """`Task.answers`, with the name of the set where there are several."""
    losses: list[dict[str, Any]]
    """Likewise of each record its `id`, summed `loss` and `weight` (number of terms), where the
    task knows them."""
    seconds: float
    peak_gib: float
    """Of the rank that held most."""

    @property
    def cost(self) -> dict[str, float]:
        """Time and memory, as in metrics.jsonl."""
        return {
            "evaluation_seconds": round(self.seconds, 3),
            "evaluation_peak_memory_gib": round(self.peak_gib, 3),
        }


def evaluate(session: Session) -> dict[str, float]:
    """The scores of `full_evaluation`. Collective."""
    return full_evaluation(session).scores


@torch.no_grad()
def full_evaluation(session: Session) -> Evaluation:
    """Mean loss per learned token (or record) on the evaluation data, and the task's metrics: where
    there are several sets `eval_SET_NAME` of each, and as `eval_NAME` the mean over the sets.
    Collective."""
    began, device = time.perf_counter(), session.world.device
    begin_peak(device)
    by_set: dict[str, dict[str, float]] = {}
    answers: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for name in session.config.data.eval_names:
        by_set[name], *found = _evaluate_set(session, name)
        for kept, of_set in zip((answers, losses), found, strict=True):
            kept += [{**({"set": name} if name else {}), **record} for record in of_set]
    peak = max(session.world.gather(peak_of_phase(device))) / GIB
    return Evaluation(_named(by_set), answers, losses, time.perf_counter() - began, peak)


def _evaluate_set(
    session: Session, name: str
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """(scores, answers, losses of records) on one set."""
    data, records = session.held_out(name)
    shown = session.config.log.shown if session.world.is_main else "none"
    with session.method.inference():
        parts = _forward(session, data, records, bar=(name, shown), together=_together(session))
    scores = {"loss": _mean(parts)}
    scores |= session.task.scores_of_loss(scores["loss"])
    guesses = {
        example: guess
        for part in parts
        for example, guess in zip(part.examples, part.predictions, strict=False)
    }
    losses = _by_record(parts, data)
    if session.config.generation.records:
        generated = answer_records(session, data, records)
        return scores | generated.scores, generated.answers, losses
    if not guesses:
        return scores, [], losses
    examples = sorted(guesses)
    given = (
        [guesses[example] for example in examples],
        data.labels_of(examples),
        data.records[examples].tolist(),
    )
    return scores | session.task.metrics(*given), session.task.answers(*given), losses


def _together(session: Session) -> Callable[[float], int]:
    """How many micro-batches, of a mean number of tokens, a pass takes at once on a GPU that waits
    for launches: small models run at the speed of the CPU. Without gradients a pass holds what one
    block computes, in training that of all blocks that keep their activations."""
    flops = model_flops(session.backbone.model)
    if session.world.device.type != "cuda" or flops is None or _grows_faster(session):
        return lambda _: 1
    most = max(1, session.backbone.blocks.saved // 2)
    return lambda tokens: min(most, max(1, int(_BUSY / (2.0 * flops.matrices * tokens))))


def _grows_faster(session: Session) -> bool:
    """Whether micro-batches at once may need more than that: a mask of all pairs of positions of a
    longer row, all logits; or are refused, as several rows of documents by flash attention."""
    model, rows = session.backbone.model, session.backbone.rows
    flash = session.config.model.attention == "flash_attention_2"
    if rows.end_to_end and not (flash or model.config._attn_implementation == VARLEN):
        return True
    if flash and session.config.packs_rows and not rows.end_to_end:
        return True
    return model.get_output_embeddings() is not None and loss_head(model) is None


def _by_record(parts: Sequence["_Part"], data: TokenDataset) -> list[dict[str, Any]]:
    """The loss and weight of each record, summed over its examples; [] by a task that does not
    know them."""
    found: dict[int, list[float]] = {}
    for part in parts:
        records = data.records[part.examples].tolist()
        for record, loss, weight in zip(records, part.losses, part.weights, strict=False):
            of_record = found.setdefault(record, [0.0, 0])
            of_record[0] += loss
            of_record[1] += weight
    return [
        {"id": record, "loss": loss, "weight": weight}
        for record, (loss, weight) in sorted(found.items())
    ]


def _named(by_set: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores by the names that they have in metrics.jsonl, their means over the sets first. (Half
    widths of intervals have none, nor has what only some of the sets give, such as scores of
    questions without an answer.)"""
    first, *_ = by_set.values()
    means = {
        f"eval_{score}": math.fsum(scores[score] for scores in by_set.values()) / len(by_set)
        for score in first
        if len(by_set) == 1
        or (not score.endswith("_interval") and all(score in scores for scores in by_set.values()))
    }
    sets = {
        f"eval_{name}_{score}": value
        for name, scores in by_set.items()
        if name
        for score, value in scores.items()
    }
    return means | sets


def mean_loss(
    session: Session, data: TokenDataset, records: np.ndarray, *, gradients: bool = False
) -> float:
    """Mean loss on some records; `gradients`: also accumulate its gradient in the optimizer's
    buffer, summed over ranks. Collective; all ranks run the same number of forward passes."""
    weight = int(data.weights[records].sum())
    parts = _forward(session, data, records, weight if gradients else None)
    if gradients:
        session.world.sum_(session.masked_optimizer.gradients)
    return _mean(parts)


class _Part(NamedTuple):
    """Results of one micro-batch; ordered by its global index."""

    number: int
    loss: float
    weight: int
    examples: list[int]
    predictions: list[Any]
    losses: list[float]
    """Of each example; none where the task does not know them."""
    weights: list[int]


def _forward(
    session: Session,
    data: TokenDataset,
    records: np.ndarray,
    weight: int | None = None,
    bar: tuple[str, Shown] = ("", "none"),
    together: Callable[[float], int] = lambda _: 1,
) -> list[_Part]:
    """Results of all ranks' micro-batches by global index, without dropout; with `weight`, also
    gradients of loss / weight. Micro-batches and the order of sums do not depend on the number of
    ranks. `together`: number of micro-batches, of a mean number of tokens, to be run as one."""
    world, task = session.world, session.task
    parts = []
    was_training = session.model.training
    session.model.eval()
    options, rows = session.config.data, session.backbone.rows
    sequences = packed_records(
        np.asarray(records), data, options, together=task.options.records_together
    )
    micro_batches = cut(sequences, data, options, options.micro_batch_size, rows)
    tokens = int(data.lengths[np.concatenate(sequences)].sum())
    count = together(tokens / len(micro_batches))
    micro_batches = [
        [sequence for one in micro_batches[first : first + count] for sequence in one]
        for first in range(0, len(micro_batches), count)
    ]
    lengths = [row_length(one, data, rows) for one in micro_batches]
    rows = rows.fitted(lengths, max(lengths))
    own = assign_micro_batches(micro_batches, data, task, rows, world.rank, world.size)
    with EvaluationBar(bar[0], -(-len(micro_batches) // world.size), bar[1]) as progress:
        for index, batch in own:
            session.watchdog.alive(f"micro-batch {index} of an evaluation")
            batch = batch.to(world.device)
            loss, *of_examples = task.scored(session.model, batch)
            if weight is not None:
                session.engine.backward(loss / weight)
            guesses, losses = (
                found.tolist() if found is not None and batch.records else []
                for found in of_examples
            )
            total = float(loss.detach())
            parts.append(
                _Part(index, total, batch.weight, batch.records, guesses, losses, batch.weights)
            )
            progress.advance()
    session.model.train(was_training)
    return sorted(_Part(*part) for of_rank in world.gather(parts) for part in of_rank)


def _mean(parts: list[_Part]) -> float:
    return math.fsum(part.loss for part in parts) / sum(part.weight for part in parts)


def evaluate_saved(config: Config, world: World, saved: Saved) -> dict[str, float]:
    """The scores of `full_evaluation` of a checkpoint. Collective."""
    return full_evaluation(open_saved(config, world, saved)).scores


def open_saved(config: Config, world: World, saved: Saved) -> Session:
    """A checkpoint's adapters on the backbone that `config` describes. Collective."""
    unreached = saved.state.get("unreached", [])
    session = open_session(
        config, world, saved.initial_adapters, unreached, frozen=lambda _: saved.frozen
    )
    with world.all_or_none():
        now, then = session.task.labels_state(), saved.state["labels"]
        if now != then:
            given, made = (", ".join(one.get("labels", [])) for one in (now, then))
            raise UserError(
                f"{config.data.train_name} has the labels {given}, but {saved.checkpoint} was made "
                f"with {made}; accepted: training data with the same"
            )
        load_trained(session, saved.checkpoint, saved.tensors)
    return session
