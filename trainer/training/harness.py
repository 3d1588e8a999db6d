"""EleutherAI's lm-evaluation-harness on a session's model: quantised and sharded as it trained,
adapters included. An optional dependency (`pip install 'rankcast[eval]'`).

Under engines whose gathers are collective every rank runs the same requests in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.config.validation import one_of
from trainer.errors import UserError, first_line
from trainer.session import Session


def run_harness(
    session: Session,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """The harness's own results by task: metrics by name, as fractions.

    `include`: folder of further task files. `shots`: of examples in the prompt, the task's own
    number where None. `limit`: only so many records of a task. Collective. Raises UserError for
    unknown tasks and those whose data cannot be read."""
    harness = _Harness(include)
    named = harness.load(tasks)
    with _untouched(session):
        found = harness.evaluate(session, named, shots, limit, batch_size)
    return {name: dict(scores) for name, scores in sorted(found["results"].items())}


def refuse_missing() -> None:
    """Raises UserError where the harness is not installed; nothing is loaded then."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tasks: EleutherAI's harness cannot be imported ({error}); accepted: with "
            "pip install 'rankcast[eval]'"
        ) from error


class _Harness:
    """The parts of lm_eval that are used."""

    def __init__(self, include: Path | None):
        if include is not None and not include.is_dir():
            raise UserError(f"--include-path: {include} given; accepted: a folder of task files")
        from lm_eval.tasks import TaskManager

        self._manager = TaskManager(include_path=None if include is None else str(include))

    def load(self, tasks: Sequence[str]) -> list[str]:
        """Those names, whose tasks can be read."""
        for name in tasks:
            one_of("--tasks", name, sorted(self._manager.task_index))
            try:
                self._manager.load([name])
            except Exception as error:  # of the task's file, or of whatever reads its data
                raise UserError(
                    f"--tasks: {name} cannot be loaded ({first_line(error)}); accepted: a task "
                    "whose data can be read, such as one of --include-path on local files"
                ) from error
        return list(tasks)

    def evaluate(
        self, session: Session, tasks: list[str], shots: int | None, limit: int | None, size: int
    ) -> Any:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=session.model, tokenizer=session.tokenizer, batch_size=size,
            softmax_dtype=torch.float32,
        )  # fmt: skip
        return simple_evaluate(
            model, tasks=tasks, task_manager=self._manager, num_fewshot=shots, limit=limit,
            log_samples=False, bootstrap_iters=0,
        )  # fmt: skip


@contextmanager
def _untouched(session: Session) -> Iterator[None]:
    """Within: adapters as in inference, and nothing that the harness does to a model it is given
    changes this one (it ties weights anew, which are sharded or packed here)."""
    model, was_training = session.model, session.model.training
    model.eval()
    object.__setattr__(model, "tie_weights", lambda *_, **__: None)
    try:
        with session.method.inference(), torch.no_grad():
            yield
    finally:
        object.__delattr__(model, "tie_weights")
        model.train(was_training)
