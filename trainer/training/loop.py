"""Training loop: optimizer steps (`step.py`), logging, evaluation and checkpoints, until the last
step or a stop request.
"""

from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.store import newest
from trainer.checkpoint.writer import CheckpointWriter, NoWriter
from trainer.data.loader import Loader
from trainer.device_memory import peak_gib
from trainer.distributed.world import World
from trainer.engine.sharded_optimizer import ShardedOptimizer
from trainer.errors import Diverged
from trainer.records import phases
from trainer.records.callbacks import Evaluated, StepRecord
from trainer.records.progress import Progress
from trainer.session import Session
from trainer.training.best import is_exhausted, is_incomparable, judge
from trainer.training.evaluation import full_evaluation
from trainer.training.speed import Clock, known_peak
from trainer.training.step import StepDone, Training, settled, train_step
from trainer.training.stop_request import Interrupted, StopRequest


@dataclass(frozen=True)
class Run:
    """Components of the training loop."""

    training: Training
    writer: CheckpointWriter | NoWriter
    progress: Progress
    stop: StopRequest

    @property
    def session(self) -> Session:
        return self.training.session

    @property
    def ended(self) -> bool:
        """Whether all steps are made, or `run.patience` is exhausted."""
        done = self.progress.step == self.training.steps
        return done or is_exhausted(self.session.config, self.progress)

    def asked_to_stop(self) -> bool:
        """Whether any rank has a stop request, or a callback of the user's has failed.
        Collective."""
        return self.session.world.any(self._has_reason)

    def must_stop(self) -> bool:
        """The same, or any rank has a failed checkpoint write, which the next save reports.
        Collective."""
        return self.session.world.any(self._has_reason or self.writer.failed)

    @property
    def _has_reason(self) -> bool:
        return self.stop.reason is not None or self.training.recorder.failure is not None


def train(run: Run) -> None:
    """Train from `run.progress` to the end. Raises Interrupted, on every rank, once the state
    at a stop request is saved. Collective."""
    training, progress, config = run.training, run.progress, run.session.config
    with run.session.watchdog, settled():
        stopping = run.asked_to_stop()
        if not stopping:
            _begin(run)
        phases.enter("first step")
        peak = known_peak(run.session)
        clock = Clock(peak)
        while not run.ended and not stopping:
            done = train_step(training, progress.step, meanwhile=run.must_stop)
            if phases.is_begun():
                training.recorder.started(phases.end())
            stopping = done.meanwhile
            progress.count(skipped=done.update.skipped)
            clock.count(done)
            last = progress.step == training.steps
            # The first loss is the untrained model's: what the end is judged by.
            is_logged = last or progress.step == 1 or _due(config.log.every, progress.step)
            training.recorder.on_step(_record(run, done, clock if is_logged else None))
            clock = Clock(peak) if is_logged else clock
            if progress.skipped_in_a_row >= min(config.optim.max_skipped_steps, training.steps):
                _give_up(run)
            is_best = False
            if last or (_due(config.run.eval_every, progress.step) and not stopping):
                with clock.paused():
                    is_best = _evaluate(run)
                stopping = run.asked_to_stop()
            if run.ended or stopping or is_best or _due(config.checkpoint.every, progress.step):
                run.writer.save(progress)
            run.writer.tell_saved()
        failed = run.session.world.any(training.recorder.failure is not None)
        if failed or not run.ended:
            _leave(run)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _begin(run: Run) -> None:
    """Evaluate and call `on_train_begin` before the first step; on resume, make up for a missed
    evaluation."""
    options, progress = run.session.config.run, run.progress
    if progress.step == 0:
        if options.eval_at_start:
            phases.enter("evaluating")
            _evaluate(run)
        optimizer: Any = run.session.optimizer
        run.session.method.on_train_begin(optimizer, run.training.validate)
    elif _due(options.eval_every, progress.step) and progress.evaluated < progress.step:
        _evaluate(run)
        if options.keep_best is not None:  # the checkpoint does not know of it
            run.writer.save(progress)


def _evaluate(run: Run) -> bool:
    """Evaluate and record; whether it is the best so far. Collective."""
    session, progress, recorder = run.session, run.progress, run.training.recorder
    if session.config.data.eval is None:
        return False
    recorder.set_state("evaluating")
    found = full_evaluation(session)
    progress.evaluated = progress.step
    is_best = judge(session, progress, found.scores)
    best = {} if progress.best is None else {"best_step": progress.best.step}
    if is_incomparable(session.config, progress, found.scores):
        recorder.log_line(
            f"step {progress.step}: {session.config.run.keep_best} is not finite, so that this "
            "evaluation cannot be the best (run.keep_best)"
        )
    recorder.on_eval(
        Evaluated(
            progress.step,
            {"step": progress.step, **found.scores, **found.cost, **best},
            found.answers,
            found.losses if session.config.log.record_losses else [],
            is_kept=is_best or session.config.run.keep_best is None,
        )
    )
    if not run.ended or progress.step == run.training.steps:
        return is_best
    recorder.log_line(
        f"step {progress.step}: no better {session.config.run.keep_best} in {progress.waited} "
        "evaluations (run.patience): training ends"
    )
    return is_best


def _record(run: Run, done: StepDone, clock: Clock | None) -> StepRecord:
    """What is told of a step, with the line of metrics.jsonl where it is logged (`clock`: since the
    last one). Collective."""
    session, step, update = run.session, run.progress.step, done.update
    rate, epoch = session.optimizer.learning_rate, round(done.epoch, 6)
    logged = None
    if clock is not None:
        logged = {
            "step": step,
            "epoch": epoch,
            "loss": update.loss,
            "learning_rate": rate,
            "grad_norm": update.grad_norm,
            **_figures(session, run.progress, clock),
        }
        if session.world.is_main:  # whose method alone has scalars
            logged |= {f"method/{name}": v for name, v in session.method.scalars().items()}
    return StepRecord(step, update.loss, rate, update.grad_norm, epoch, update.skipped, logged)


def _figures(session: Session, progress: Progress, clock: Clock) -> dict[str, Any]:
    """Speed, memory and parameter counts for the log. Collective."""
    peaks = session.world.gather(round(peak_gib(session.world.device), 3))
    gpus = session.world.size if session.world.device.type == "cuda" else 0
    heads = sum(p.numel() for head in session.backbone.heads.values() for p in head.parameters())
    heads += sum(p.numel() for p in session.method.trained_parameters.values())
    return {
        **clock.figures(gpus),
        "peak_memory_gib": max(peaks),
        **({"peak_memory_gib_by_rank": peaks} if len(peaks) > 1 else {}),
        "trainable_parameters": session.optimizer.numel,
        "active_parameters": session.optimizer.numel
        if isinstance(session.optimizer, ShardedOptimizer)
        else session.method.adapters.active_parameters() + heads + session.backbone.row_parameters,
        "skipped_steps": progress.skipped,
    }


def _leave(run: Run) -> None:
    """Raise Interrupted, or the failure of a callback, on all ranks, once the pending checkpoint is
    written. Collective."""
    run.writer.wait()
    with run.session.world.all_or_none():
        if run.training.recorder.failure is not None:
            raise run.training.recorder.failure
    reasons = [reason for reason in run.session.world.gather(run.stop.reason) if reason]
    with run.session.world.all_or_none():
        raise Interrupted(
            f"{reasons[0]}: stopped after step {run.progress.step}; last checkpoint: "
            f"{newest(run.writer.folder) or 'none'}; restart to resume"
        )


def _give_up(run: Run) -> None:
    """Abort after too many consecutive non-finite steps. Collective."""
    run.writer.wait()
    with run.session.world.all_or_none():
        raise Diverged(
            f"step {run.progress.step}: loss or gradient not finite "
            f"{run.progress.skipped_in_a_row} times in a row (optim.max_skipped_steps); last good "
            f"checkpoint: {newest(run.writer.folder) or 'none'}"
        )


def total_steps(session: Session, loader: Loader) -> int:
    """Optimizer steps of the run, those before a resume included."""
    run = session.config.run
    return run.steps if run.steps is not None else loader.steps_for(run.epochs or 1.0)


def make_loader(session: Session, world: World) -> Loader:
    """The loader of the training data for this rank."""
    config = session.config
    return Loader(
        session.train_data, session.task, config.data, config.run.seed, world.rank, world.size,
        session.left_out, session.backbone.rows,
    )  # fmt: skip
