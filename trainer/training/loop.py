"""The algorithm. Reads top-down: decide (or after it), accumulate, observe, step, log, save."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from adapters import seeds
from adapters.methods.base import Validate
from trainer.checkpoint.state import CheckpointWriter
from trainer.checkpoint.store import newest
from trainer.data.loader import Loader, Step
from trainer.decisions import consensus
from trainer.decisions.log import AllocationLog
from trainer.decisions.replay import Replay
from trainer.distributed.world import World
from trainer.engine.base import Update
from trainer.errors import RunFailed
from trainer.memory import planner
from trainer.model.footprint import held_bytes, peak_gib, readable, release
from trainer.records.metrics import MetricsWriter
from trainer.records.progress import Progress
from trainer.session import Session
from trainer.training.evaluation import evaluate
from trainer.training.lr_schedule import learning_rate
from trainer.training.stop_request import Interrupted, StopRequest
from trainer.training.validation import make_validate


@dataclass
class Clock:
    """Time and tokens since the last logged step."""

    started: float
    tokens: int = 0
    steps: int = 0


def train(
    session: Session,
    loader: Loader,
    writer: CheckpointWriter,
    metrics: MetricsWriter | None,
    log: AllocationLog | None,
    progress: Progress,
    steps: int,
    stop: StopRequest,
    replay: Replay | None = None,
) -> None:
    """Train from `progress` to `steps` optimizer steps. Raises Interrupted, on every rank, once
    what was trained until `stop` is saved.

    `metrics`, `log` (decisions) and `replay` (another run's) are rank 0's, None elsewhere.
    """
    config, engine, method = session.config, session.engine, session.method
    optimizer, world = session.optimizer, session.world
    validate = make_validate(session)
    batches = iter(loader)
    with session.watchdog:
        stopping = world.any(stop.reason is not None)
        if not stopping:
            _begin(session, metrics, progress, validate)
        clock = Clock(time.perf_counter())
        while progress.step < steps and not stopping:
            step = progress.step
            if method.decides_before == "forward":
                _decide(session, metrics, log, replay, step)
            micro_batch_size = method.micro_batch_size or config.data.micro_batch_size
            if micro_batch_size != loader.micro_batch_size:
                loader.micro_batch_size = micro_batch_size
                log_plan(metrics, planner.make_plan(session, micro_batch_size))
            batch = next(batches)
            loss = _accumulate_fitting(session, metrics, batch, step)
            if method.decides_before == "update":  # while a GPU is still busy with the gradients
                _decide(session, metrics, log, replay, step)
            # A checkpoint that could not be written is reported with the next one: make that now.
            stopping = world.any(stop.reason is not None or writer.failed)
            mean_loss = engine.reduce(optimizer, loss)
            method.observe(step, optimizer)
            optimizer.learning_rate = learning_rate(config.optim, step, steps)
            update = engine.step(optimizer, mean_loss, config.optim.max_grad_norm)
            method.after_step(step, optimizer, skipped=update.skipped, validate=validate)

            progress.count(skipped=update.skipped)
            clock.tokens, clock.steps = clock.tokens + batch.tokens, clock.steps + 1
            last = progress.step == steps
            if metrics is not None:
                metrics.advance(progress.step, update.loss, skipped=update.skipped)
            if last or _due(config.log.every, progress.step):
                _log(session, metrics, progress, clock, batch.epoch, update)
                clock = Clock(time.perf_counter())
            if progress.skipped_in_a_row >= min(config.optim.max_skipped_steps, steps):
                _give_up(world, writer, progress)
            if last or (_due(config.run.eval_every, progress.step) and not stopping):
                paused = time.perf_counter()
                _evaluate(session, metrics, progress)
                clock.started += time.perf_counter() - paused
                stopping = world.any(stop.reason is not None)
            if last or stopping or _due(config.checkpoint.every, progress.step):
                writer.save(progress)
        if progress.step < steps:
            _leave(world, writer, stop, progress)


def _decide(
    session: Session,
    metrics: MetricsWriter | None,
    log: AllocationLog | None,
    replay: Replay | None,
    step: int,
) -> None:
    """What holds from this step on: decided, applied, recorded."""
    decision, changed = consensus.decide_and_apply(session.method, step, session.world, replay)
    if changed:
        _rebind(session, metrics, step)
    if log is not None and decision is not None:
        log.write(step, decision)


def _begin(
    session: Session, metrics: MetricsWriter | None, progress: Progress, validate: Validate
) -> None:
    """What comes before the first step, and the evaluation that a stopped run was to make."""
    options = session.config.run
    if progress.step == 0:
        if options.eval_at_start:
            _evaluate(session, metrics, progress)
        session.method.on_train_begin(session.optimizer, validate)
    elif _due(options.eval_every, progress.step) and progress.evaluated < progress.step:
        _evaluate(session, metrics, progress)


def _leave(world: World, writer: CheckpointWriter, stop: StopRequest, progress: Progress) -> None:
    """All ranks, asked to stop: once what is being written is complete."""
    writer.wait()
    reasons = [reason for reason in world.gather(stop.reason) if reason]
    with world.all_or_none():
        raise Interrupted(
            f"{reasons[0]}: stopped after step {progress.step}; last checkpoint: "
            f"{newest(writer.folder) or 'none'}; started again the run goes on"
        )


def _give_up(world: World, writer: CheckpointWriter, progress: Progress) -> None:
    """All ranks: nothing good comes of going on."""
    writer.wait()
    with world.all_or_none():
        raise RunFailed(
            f"step {progress.step}: loss or gradient not finite {progress.skipped_in_a_row} times "
            f"in a row (optim.max_skipped_steps); last good checkpoint: "
            f"{newest(writer.folder) or 'none'}"
        )


def _rebind(session: Session, metrics: MetricsWriter | None, step: int) -> None:
    """After adapters were removed or resized: the optimizer's buffers too, memory given back."""
    device, before = session.world.device, held_bytes(session.world.device)
    session.optimizer.rebind_parameters(session.trainables())
    release(device)
    if metrics is not None:
        adapters = session.method.adapters.values()
        metrics.say(
            f"step {step}: {len(adapters)} of {len(session.method.units)} units kept, rank "
            f"{max((adapter.rank for adapter in adapters), default=0)}, memory "
            f"{readable(before)} -> {readable(held_bytes(device))}"
        )


def _accumulate_fitting(
    session: Session, metrics: MetricsWriter | None, batch: Step, step: int
) -> torch.Tensor:
    """As `accumulate`; where the memory does not suffice, again with fewer activations kept."""
    while True:
        loss = None
        try:
            loss = accumulate(session, batch, step)
        except torch.OutOfMemoryError as error:
            if session.engine.collective_gather:  # the others wait in the middle of a block
                raise planner.oom_error(session) from error
        lacking = not session.engine.collective_gather and session.world.any(loss is None)
        if loss is not None and not lacking:
            return loss
        session.optimizer.zero_grad()
        with session.world.all_or_none():
            remark = planner.reduce_plan(session)
        if metrics is not None:
            metrics.say(f"step {step + 1}: {remark}")


def log_plan(metrics: MetricsWriter | None, plan: planner.Plan | None) -> None:
    if metrics is not None and plan is not None:
        metrics.say(f"memory    {plan}")


def accumulate(session: Session, batch: Step, step: int) -> torch.Tensor:
    """Gradients of this rank's micro-batches; returns its part of the mean loss.

    Every term is divided by the number of terms in the whole step, over all ranks: the sum of all
    parts is then the mean over learned tokens, however they are spread.
    """
    total = torch.zeros((), dtype=torch.float64, device=session.world.device)
    for index, micro_batch in batch.micro_batches:
        session.watchdog.alive(f"micro-batch {index} of step {step + 1}")
        # Dropout, the adapters' and the backbone's own, depends on the micro-batch and not on who
        # runs it.
        session.method.adapters.set_dropout_seed(step, index)
        torch.manual_seed(seeds.mixed(session.config.run.seed, step, index))
        loss, _ = session.task.loss(session.model, micro_batch.to(session.world.device))
        loss = loss / batch.weight
        session.engine.backward(loss)
        total += loss.detach()
    return total


def _evaluate(session: Session, metrics: MetricsWriter | None, progress: Progress) -> None:
    if session.config.data.eval is None:
        return
    if metrics is not None:
        metrics.heartbeat.tell("evaluating")
    scores = evaluate(session)
    progress.evaluated = progress.step
    if metrics is not None:
        metrics.write({"step": progress.step, **scores})


def _log(
    session: Session,
    metrics: MetricsWriter | None,
    progress: Progress,
    clock: Clock,
    epoch: float,
    update: Update,
) -> None:
    """One line of metrics, from figures of all ranks."""
    figures = _figures(session, progress, clock)
    if metrics is None:
        return
    metrics.write(
        {
            "step": progress.step,
            "epoch": round(epoch, 6),
            "loss": update.loss,
            "learning_rate": session.optimizer.learning_rate,
            "grad_norm": update.grad_norm,
            **figures,
            **{f"method/{name}": v for name, v in session.method.scalars().items()},
        }
    )


def _figures(session: Session, progress: Progress, clock: Clock) -> dict[str, Any]:
    """Speed, memory and sizes, for the log. All ranks call it together."""
    peaks = session.world.gather(round(peak_gib(session.world.device), 3))
    seconds = time.perf_counter() - clock.started
    heads = sum(p.numel() for head in session.backbone.heads.values() for p in head.parameters())
    return {
        "tokens_per_second": round(clock.tokens / seconds, 1),
        "step_seconds": round(seconds / clock.steps, 4),
        "peak_memory_gib": max(peaks),
        **({"peak_memory_gib_by_rank": peaks} if len(peaks) > 1 else {}),
        "trainable_parameters": session.optimizer.numel,
        "active_parameters": session.method.adapters.active_parameters() + heads,
        "skipped_steps": progress.skipped,
    }


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def total_steps(session: Session, loader: Loader) -> int:
    """Optimizer steps of the whole run."""
    run = session.config.run
    return run.steps if run.steps is not None else loader.steps_for(run.epochs or 1.0)


def make_loader(session: Session, world: World) -> Loader:
    """The loader of the training data for this rank."""
    config = session.config
    return Loader(
        session.train_data, session.task, config.data, config.run.seed, world.rank, world.size,
        session.left_out,
    )  # fmt: skip
