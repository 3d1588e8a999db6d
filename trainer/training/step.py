"""One optimizer step, the same for training, tests and benchmarks.

decide (most methods) → forward, backward → decide (the others) → reduce over ranks → observe
→ learning rate → clip, update → after the step
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from adapters import seeds
from adapters.methods.base import Method, Validate
from trainer.data.loader import Step
from trainer.decisions import consensus
from trainer.decisions.replay import Replay
from trainer.device_memory import held_bytes, readable, release
from trainer.engine.base import Update
from trainer.errors import RunFailed, UserError
from trainer.memory import planner
from trainer.model.backbone import class_name
from trainer.records.recorder import Recorder, SilentRecorder
from trainer.session import Session
from trainer.tasks.base import Batch
from trainer.training.lr_schedule import learning_rate
from trainer.verification.first_steps import FirstSteps

T = TypeVar("T")


class Batches(Protocol):
    """Source of steps: the loader, or a benchmark's generator."""

    micro_batch_size: int | None
    """Sequences; None: cut by tokens."""

    def next_step(self) -> Step: ...


@dataclass(frozen=True)
class Training:
    """Components that the steps of a run share."""

    session: Session
    batches: Batches
    steps: int
    """Length of the run, at which the learning-rate schedule ends."""
    validate: Validate
    recorder: Recorder = SilentRecorder()  # noqa: RUF009 (it has no state)
    replay: Replay | None = None
    """Rank 0: recorded decisions to apply in place of the method's own."""
    first_steps: FirstSteps | None = None
    """Proves that every adapter trains; None: not proved (again)."""
    capture: Callable[[], str | None] = lambda: None
    """Captures CUDA graphs anew, after tensors were replaced; returns a line for the log."""


@dataclass(frozen=True)
class StepDone:
    """Result of a step."""

    update: Update
    tokens: int
    """Tokens of the global batch, without padding."""
    lengths: np.ndarray
    """Tokens of its documents."""
    weight: int
    """Terms of its summed loss."""
    epoch: float
    meanwhile: Any
    """Result of the `meanwhile` callback."""


def train_step(
    training: Training, step: int, meanwhile: Callable[[], Any] = lambda: None
) -> StepDone:
    """Optimizer step `step` (from 0). Collective.

    `meanwhile` is called before the update, while the GPU still computes gradients.
    """
    session = training.session
    method, optimizer, optim = session.method, session.optimizer, session.config.optim
    batch, loss = gradients_and_decision(
        method, step, lambda: _decide(training, step), lambda: _gradients(training, step)
    )
    found = meanwhile()
    mean_loss = session.engine.reduce(optimizer, loss)
    proof = training.first_steps

    def update() -> Update:
        optimizer.learning_rate = learning_rate(optim, step, training.steps)
        if proof is not None:
            proof.before_update()
        return session.engine.step(optimizer, mean_loss, optim.max_grad_norm)

    done = observed_update(method, step, optimizer, update, training.validate)
    if proof is not None:
        proof.after_update(done)
    return StepDone(done, batch.tokens, batch.lengths, batch.weight, batch.epoch, found)


def gradients_and_decision(
    method: Method, step: int, decide: Callable[[], Any], gradients: Callable[[], T]
) -> T:
    """First half of a step. `decide` runs before the forward pass or, while the GPU still computes
    gradients, before the update (`method.decides_before_at`)."""
    before = method.decides_before_at(step)
    if before == "forward":
        decide()
    found = gradients()
    if before == "update":
        decide()
    return found


def observed_update(
    method: Method,
    step: int,
    optimizer: Any,
    update: Callable[[], Update],
    validate: Validate,
) -> Update:
    """Second half of a step, on gradients reduced over all ranks."""
    method.observe(step, optimizer)
    done = update()
    method.after_step(step, optimizer, skipped=done.skipped, validate=validate)
    return done


def _decide(training: Training, step: int) -> None:
    """Decide, apply and record what holds from this step on."""
    session = training.session
    decision, changed = consensus.decide_and_apply(
        session.method, step, session.world, training.replay
    )
    if changed:
        _rebind(training, step)
    if decision is not None:
        training.recorder.on_decision(step, decision)


def _rebind(training: Training, step: int) -> None:
    """Rebind the optimizer's buffers after adapters were removed or resized, and free memory."""
    session = training.session
    device, before = session.world.device, held_bytes(session.world.device)
    session.backbone.blocks.graphs.forget()  # they hold memory, and tensors that are replaced
    trainables = session.trainables()
    if not any(not one.observed for one in trainables):  # the same on every rank
        raise RunFailed(f"step {step}: no unit keeps an adapter: {session.method.keeps_none}")
    session.masked_optimizer.rebind_parameters(trainables)
    release(device)
    adapters = session.method.adapters.values()
    training.recorder.log_line(
        f"step {step}: {len(adapters)} of {len(session.method.units)} units kept, rank "
        f"{max((adapter.rank for adapter in adapters), default=0)}, memory "
        f"{readable(before)} -> {readable(held_bytes(device))}"
    )
    log_graphs(training.recorder, training.capture())


def _gradients(training: Training, step: int) -> tuple[Step, torch.Tensor]:
    """(the step's batch, this rank's part of its mean loss); the gradients are in the optimizer's
    buffer. The method may change the micro-batch size."""
    session, batches = training.session, training.batches
    size = session.method.micro_batch_size or session.config.data.micro_batch_size
    if size != batches.micro_batch_size:
        batches.micro_batch_size = size
        session.backbone.blocks.graphs.forget()
        log_plan(training.recorder, planner.make_plan(session, size))
        log_graphs(training.recorder, training.capture())
    batch = batches.next_step()
    return batch, _accumulate_within_memory(training, batch, step)


def _accumulate_within_memory(training: Training, batch: Step, step: int) -> torch.Tensor:
    """`accumulate`, repeated with fewer saved activations when out of memory. Collective."""
    session = training.session
    while True:
        loss = None
        try:
            loss = accumulate(session, batch, step)
        except torch.OutOfMemoryError as error:
            if session.engine.collective_gather:  # the others wait in a block's all-gather
                raise planner.oom_error(session) from error
        out_of_memory = not session.engine.collective_gather and session.world.any(loss is None)
        if loss is not None and not out_of_memory:
            return loss
        session.optimizer.zero_grad()
        with session.world.all_or_none():
            remark = planner.reduce_plan(session)
        training.recorder.log_line(f"step {step + 1}: {remark}")


def accumulate(session: Session, batch: Step, step: int) -> torch.Tensor:
    """Forward and backward of this rank's micro-batches; returns its part of the mean loss.

    The loss is divided by the number of loss terms of the global batch, so that the sum over ranks
    is the mean over learned tokens, however they are distributed.
    """
    total = torch.zeros((), dtype=torch.float64, device=session.world.device)
    for index, micro_batch in batch.micro_batches:
        session.watchdog.alive(f"micro-batch {index} of step {step + 1}")
        # Dropout (adapters and backbone) depends on the micro-batch, not on the rank that runs it.
        session.method.adapters.set_dropout_seed(step, index)
        torch.manual_seed(seeds.mixed(session.config.run.seed, step, index))
        with session.casts.fresh():
            total += _gradients_of(session, micro_batch, batch.weight)
    return total


def _gradients_of(session: Session, micro_batch: Batch, weight: int) -> torch.Tensor:
    """Forward and backward of a micro-batch; its part of the mean loss."""
    with session.backbone.blocks.graphs.replaying():
        loss, _ = session.task.loss(session.model, micro_batch.to(session.world.device))
    loss = loss / weight
    if not loss.requires_grad:
        raise UserError(
            f"model.id: the loss of {class_name(session.model)} has no gradient: the model "
            "runs its layers outside of autograd's record; accepted: other models"
        )
    session.engine.backward(loss)
    return loss.detach()


@contextmanager
def settled() -> Iterator[None]:
    """Context of the steps: what exists before them stays, and Python's garbage collector does not
    go through all of it every few steps, for as long as a short step takes."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def log_plan(recorder: Recorder, plan: planner.Plan | None) -> None:
    """Log the plan for the GPU's memory, if there is one."""
    if plan is not None:
        recorder.log_line(f"memory    {plan}")


def log_graphs(recorder: Recorder, line: str | None) -> None:
    """Log what is known of CUDA graphs, if anything."""
    if line is not None:
        recorder.log_line(f"graphs    {line}")
