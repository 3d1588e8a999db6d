"""How many blocks can keep their activations: measured on this machine, not guessed.

A probe runs two forward passes and a backward one on the largest micro-batch that the data can
give, with every block checkpointed and with one that is not. With f the peak of forward and of the
loss, b that of backward, both with every block checkpointed, and a what a block adds that keeps its
activations, n such blocks need

    max(f + n a, b + (n − 1) a)

bytes: while the last block is differentiated, all of them are held, and its own are in b already.
"""

from dataclasses import dataclass

import torch

from trainer.errors import RunFailed
from trainer.memory import readable, release
from trainer.options import DataOptions
from trainer.session import Session
from trainer.tasks.base import Batch, Example, Task


@dataclass(frozen=True)
class Plan:
    """What was decided, and from which figures (bytes, of the rank that has least room)."""

    kept: int
    blocks: int
    peak: int
    budget: int

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.blocks} blocks keep their activations, peak "
            f"{readable(self.peak)} expected of {readable(self.budget)}"
        )


def fit(session: Session, size: int | None = None, batch: Batch | None = None) -> Plan | None:
    """Measure and decide for micro-batches of `size` sequences (none: `data.micro_batch_size`), or
    for `batch`, where `engine.activation_checkpointing` is `auto` on a GPU; the same on every rank.
    RunFailed where not even checkpointing every block fits."""
    options, device, world = session.config.engine, session.world.device, session.world
    if options.activation_checkpointing != "auto" or device.type != "cuda":
        return None
    blocks = session.backbone.blocks
    assert blocks is not None
    data = session.config.data
    longest = data.max_length if data.packing else int(session.train_data.lengths.max())
    batch = batch or largest_batch(session.task, data, longest, size or data.micro_batch_size)
    measured = None
    try:
        measured = _measure(session, batch.to(device))
    except torch.OutOfMemoryError as error:
        if session.engine.shards:  # the others wait for it in the middle of a block
            raise exhausted(session) from error
    release(device)
    with world.together():
        if measured is None:
            raise exhausted(session)
    assert measured is not None
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    budget = int(options.memory_fraction * total) - foreign
    kept = min(world.gather(keepable(*measured, len(blocks), budget)))
    blocks.keep(kept)
    return Plan(kept, len(blocks), peak(kept, *measured), budget)


def _measure(session: Session, batch: Batch) -> tuple[int, int, int]:
    """f, b and a of the module's formula. Where not even one block can keep its activations, a is
    more than there is."""
    blocks, device = session.backbone.blocks, session.world.device
    assert blocks is not None
    blocks.keep(0)
    for _ in range(2):  # the first one compiles
        release(device)
        before, forward, backward = _probe(session, batch)
    blocks.keep(1)
    try:
        after, *_ = _probe(session, batch)
    except torch.OutOfMemoryError:
        if session.engine.shards:
            raise
        session.optimizer.zero_grad()
        after = before + torch.cuda.mem_get_info(device)[1]
    return forward, backward, max(1, after - before)


def peak(kept: int, forward: int, backward: int, added: int) -> int:
    """Bytes at the worst moment of a step in which `kept` blocks keep their activations."""
    return max(forward + kept * added, backward + max(0, kept - 1) * added)


def keepable(forward: int, backward: int, added: int, blocks: int, budget: int) -> int:
    """The largest n ≤ `blocks` that the module's formula allows within `budget` bytes."""
    room = min(budget - forward, budget - backward + added)
    return max(0, min(room // added, blocks))


def lower(session: Session) -> str:
    """After an out-of-memory error: keep an eighth of the blocks fewer, and say so. RunFailed where
    that is not what was asked for, or none is kept already."""
    blocks = session.backbone.blocks
    assert blocks is not None
    if session.config.engine.activation_checkpointing != "auto" or blocks.kept == 0:
        raise exhausted(session)
    release(session.world.device)
    blocks.keep(max(0, blocks.kept - -(-len(blocks) // 8)))
    return f"out of memory: {blocks.kept} of {len(blocks)} blocks keep their activations from here"


def exhausted(session: Session) -> RunFailed:
    """What a user hears of memory that ran out for good."""
    config, blocks = session.config, session.backbone.blocks
    assert blocks is not None
    if blocks.kept == 0:
        size = session.method.micro_batch_size or config.data.micro_batch_size
        return RunFailed(
            f"data.micro_batch_size: {size} sequences of up to {config.data.max_length} tokens do "
            "not fit into the GPU's memory, though every block is checkpointed; accepted: fewer, a "
            "lower data.max_length, a smaller model.quantization, or more ranks"
        )
    if config.engine.activation_checkpointing is False:
        return RunFailed(
            "engine.activation_checkpointing: false given, but the GPU's memory ran out; accepted: "
            "auto or true"
        )
    return RunFailed(
        f"engine.memory_fraction: {config.engine.memory_fraction} given, but the GPU's memory ran "
        f"out with {blocks.kept} of {len(blocks)} blocks keeping their activations; accepted: a "
        "lower fraction, or engine.activation_checkpointing=true"
    )


def largest_batch(task: Task, data: DataOptions, length: int, size: int) -> Batch:
    """A micro-batch of `size` sequences of `length` tokens, all learned; two documents each where
    they are packed, since those need a mask."""
    lengths = [length // 2, length - length // 2] if data.packing else [length]
    token = int(task.pad_token_id == 0)  # any but padding
    typed = "token_type_ids" in task.tokenizer.model_input_names
    row = [
        Example([token] * n, [0, *[1] * (n - 1)], [0] * n if typed else (), weight=n - 1)
        for n in lengths
    ]
    return task.collate([row] * size)


def _probe(session: Session, batch: Batch) -> tuple[int, int, int]:
    """Bytes held after forward, and the peaks of forward and of backward."""
    device = session.world.device
    torch.cuda.reset_peak_memory_stats(device)
    loss, _ = session.task.loss(session.model, batch)
    held, forward = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    session.engine.backward(loss)
    session.optimizer.zero_grad()
    return held, forward, torch.cuda.max_memory_allocated(device)
