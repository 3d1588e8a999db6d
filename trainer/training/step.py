"""One optimizer step, the same for training, tests and benchmarks.

decide (most methods) → forward, backward → decide (the others) → reduce over ranks → observe
→ learning rate → clip, update → after the step
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from adapters import seeds
from adapters.methods.base import Method, Validate
from adapters.optimizer import MaskedAdamW
from trainer.data.loader import Step
from trainer.decisions import consensus
from trainer.decisions.replay import Replay
from trainer.device_memory import held_bytes, readable, release
from trainer.engine.base import Update
from trainer.memory import planner
from trainer.records.recorder import Recorder, SilentRecorder
from trainer.session import Session
from trainer.training.lr_schedule import learning_rate

T = TypeVar("T")


class Batches(Protocol):
    """Where steps come from: the loader, or a benchmark's own."""

    micro_batch_size: int

    def next_step(self) -> Step: ...


@dataclass(frozen=True)
class Training:
    """What the steps of a run share."""

    session: Session
    batches: Batches
    steps: int
    """Of the whole run: the learning rate's schedule ends with it."""
    validate: Validate
    recorder: Recorder = SilentRecorder()  # noqa: RUF009 (it has no state)
    replay: Replay | None = None
    """Rank 0: decisions of another run in place of the method's own."""


@dataclass(frozen=True)
class StepDone:
    """What a step did."""

    update: Update
    tokens: int
    """Of the global batch, padding left out."""
    epoch: float
    meanwhile: Any
    """What `meanwhile` returned."""


def train_step(
    training: Training, step: int, meanwhile: Callable[[], Any] = lambda: None
) -> StepDone:
    """Optimizer step `step` (from 0). All ranks call it together.

    `meanwhile` is called before the update, while a GPU is still busy with the gradients.
    """
    session = training.session
    method, optimizer, optim = session.method, session.optimizer, session.config.optim
    batch, loss = gradients_and_decision(
        method, lambda: _decide(training, step), lambda: _gradients(training, step)
    )
    found = meanwhile()
    mean_loss = session.engine.reduce(optimizer, loss)

    def update() -> Update:
        optimizer.learning_rate = learning_rate(optim, step, training.steps)
        return session.engine.step(optimizer, mean_loss, optim.max_grad_norm)

    done = observed_update(method, step, optimizer, update, training.validate)
    return StepDone(done, batch.tokens, batch.epoch, found)


def gradients_and_decision(
    method: Method, decide: Callable[[], Any], gradients: Callable[[], T]
) -> T:
    """The first half of a step: `decide` stands where the method wants it, before the forward pass
    or, while a GPU is still busy with the gradients, before the update."""
    if method.decides_before == "forward":
        decide()
    found = gradients()
    if method.decides_before == "update":
        decide()
    return found


def observed_update(
    method: Method,
    step: int,
    optimizer: MaskedAdamW,
    update: Callable[[], Update],
    validate: Validate,
) -> Update:
    """The second half, from gradients that were reduced over all ranks."""
    method.observe(step, optimizer)
    done = update()
    method.after_step(step, optimizer, skipped=done.skipped, validate=validate)
    return done


def _decide(training: Training, step: int) -> None:
    """What holds from this step on: decided, applied, recorded."""
    session = training.session
    decision, changed = consensus.decide_and_apply(
        session.method, step, session.world, training.replay
    )
    if changed:
        _rebind(training, step)
    training.recorder.decided(step, decision)


def _rebind(training: Training, step: int) -> None:
    """After adapters were removed or resized: the optimizer's buffers too, memory given back."""
    session = training.session
    device, before = session.world.device, held_bytes(session.world.device)
    session.optimizer.rebind_parameters(session.trainables())
    release(device)
    adapters = session.method.adapters.values()
    training.recorder.say(
        f"step {step}: {len(adapters)} of {len(session.method.units)} units kept, rank "
        f"{max((adapter.rank for adapter in adapters), default=0)}, memory "
        f"{readable(before)} -> {readable(held_bytes(device))}"
    )


def _gradients(training: Training, step: int) -> tuple[Step, torch.Tensor]:
    """The step's batch, in micro-batches as large as the method wants them, and this rank's part of
    its mean loss; the gradients are in the optimizer's buffer."""
    session, batches = training.session, training.batches
    size = session.method.micro_batch_size or session.config.data.micro_batch_size
    if size != batches.micro_batch_size:
        batches.micro_batch_size = size
        say_plan(training.recorder, planner.make_plan(session, size))
    batch = batches.next_step()
    return batch, _accumulate_within_memory(training, batch, step)


def _accumulate_within_memory(training: Training, batch: Step, step: int) -> torch.Tensor:
    """As `accumulate`; where the memory does not suffice, again with fewer activations kept."""
    session = training.session
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
        training.recorder.say(f"step {step + 1}: {remark}")


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


def say_plan(recorder: Recorder, plan: planner.Plan | None) -> None:
    """What was planned for the GPU's memory, if anything was."""
    if plan is not None:
        recorder.say(f"memory    {plan}")
