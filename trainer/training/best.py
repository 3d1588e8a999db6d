"""The best evaluation so far, and whether to wait for a better one (`run.keep_best`,
`run.patience`). The evaluation before the first step does not count.
"""

import math
from collections.abc import Mapping

from trainer.config.config import Config
from trainer.errors import UserError
from trainer.records.progress import Best, Progress
from trainer.session import Session


def judge(session: Session, progress: Progress, scores: Mapping[str, float]) -> bool:
    """Compare an evaluation with the best so far; whether it is better. What is not finite never
    is. Rank 0's score counts. Collective."""
    config, metric = session.config, session.config.run.keep_best
    if metric is None or progress.step == 0:
        return False
    with session.world.all_or_none():
        if metric not in scores:
            given = ", ".join(name for name in scores if name in config.metrics)
            raise UserError(f"run.keep_best: {metric} given; accepted: {given}")
    score = session.world.broadcast(scores[metric])
    sign = 1 if config.metrics[metric] == "max" else -1
    best = progress.best
    better = math.isfinite(score) and (best is None or sign * score > sign * best.score)
    if better:
        progress.best = Best(
            metric=metric, step=progress.step, score=score, data=session.evaluation_digest()
        )
    progress.waited = 0 if better else progress.waited + 1
    return better


def is_incomparable(config: Config, progress: Progress, scores: Mapping[str, float]) -> bool:
    """Whether an evaluation counts, but its score is not finite."""
    metric = config.run.keep_best
    return metric is not None and progress.step > 0 and not math.isfinite(scores[metric])


def is_exhausted(config: Config, progress: Progress) -> bool:
    """Whether the run has waited long enough for a better evaluation."""
    return config.run.patience is not None and progress.waited >= config.run.patience
