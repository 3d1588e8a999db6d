"""How many blocks can keep their activations: measured on this machine, not guessed.

A probe runs two forward passes and a backward one on the largest micro-batch that the data can
give, with every block checkpointed and with one that is not. With f the peak of forward and of the
loss, b that of backward, both with every block checkpointed, and a what a block adds that keeps its
activations, n such blocks need

    max(f + n a, b + (n − 1) a)

bytes: while the last block is differentiated, all of them are held, and its own are in b already.
"""

import itertools
from dataclasses import dataclass

import torch

from trainer.errors import RunFailed
from trainer.memory import readable, release
from trainer.session import Session
from trainer.tasks.base import Batch, Example


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


def fit(session: Session, micro_batch_size: int | None = None) -> Plan | None:
    """Measure and decide for micro-batches of this size (none: `data.micro_batch_size`), where
    `engine.activation_checkpointing` is `auto` on a GPU; the same on every rank. RunFailed where
    not even checkpointing every block fits."""
    options, device, world = session.config.engine, session.world.device, session.world
    if options.activation_checkpointing != "auto" or device.type != "cuda":
        return None
    blocks = session.backbone.blocks
    assert blocks is not None
    size = micro_batch_size or session.config.data.micro_batch_size
    batch = largest_batch(session, size).to(device)
    try:
        blocks.keep(0)
        for _ in range(2):  # the first one compiles
            release(device)
            before, forward, backward = _probe(session, batch)
        blocks.keep(1)
        after, *_ = _probe(session, batch)
    except torch.OutOfMemoryError as error:
        raise _too_large(session) from error
    finally:
        release(device)
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    budget = int(options.memory_fraction * total) - foreign
    added = max(1, after - before)
    kept = min(world.gather(keepable(forward, backward, added, len(blocks), budget)))
    blocks.keep(kept)
    return Plan(kept, len(blocks), peak(kept, forward, backward, added), budget)


def peak(kept: int, forward: int, backward: int, added: int) -> int:
    """Bytes at the worst moment of a step in which `kept` blocks keep their activations."""
    return max(forward + kept * added, backward + max(0, kept - 1) * added)


def keepable(forward: int, backward: int, added: int, blocks: int, budget: int) -> int:
    """The largest n ≤ `blocks` that the module's formula allows within `budget` bytes."""
    room = min(budget - forward, budget - backward + added)
    return max(0, min(room // added, blocks))


def lower(session: Session) -> str:
    """After an out-of-memory error: keep an eighth of the blocks fewer, and say so. RunFailed where
    none is kept already, and where ranks gather the backbone together: one that breaks off in the
    middle cannot catch up with the others."""
    blocks = session.backbone.blocks
    assert blocks is not None
    if blocks.kept == 0:
        raise _too_large(session)
    if session.engine.shards:
        raise RunFailed(
            f"engine.memory_fraction: {session.config.engine.memory_fraction} given, but the GPU's "
            f"memory ran out with {blocks.kept} of {len(blocks)} blocks keeping their activations; "
            "accepted: a lower fraction, or engine.activation_checkpointing=true"
        )
    release(session.world.device)
    blocks.keep(max(0, blocks.kept - -(-len(blocks) // 8)))
    return f"out of memory: {blocks.kept} of {len(blocks)} blocks keep their activations from here"


def largest_batch(session: Session, size: int) -> Batch:
    """A micro-batch of `size` sequences, as long as the data and `data.max_length` allow."""
    data, options = session.train_data, session.config.data
    longest = options.max_length if options.packing else int(data.lengths.max())
    index = int(data.lengths.argmax())
    example = data[index]
    ids = itertools.islice(itertools.cycle(example.input_ids), longest)
    types = itertools.islice(itertools.cycle(example.token_type_ids), longest)
    stretched = Example(
        list(ids), [0, *[1] * (longest - 1)] if example.loss_mask else (),
        list(types) if example.token_type_ids else (), example.label, max(1, longest - 1),
    )  # fmt: skip
    return session.task.collate([[stretched]] * size)


def _probe(session: Session, batch: Batch) -> tuple[int, int, int]:
    """Bytes held after forward, and the peaks of forward and of backward."""
    device = session.world.device
    torch.cuda.reset_peak_memory_stats(device)
    loss, _ = session.task.loss(session.model, batch)
    held, forward = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    session.engine.backward(loss)
    session.optimizer.zero_grad()
    return held, forward, torch.cuda.max_memory_allocated(device)


def _too_large(session: Session) -> RunFailed:
    data = session.config.data
    return RunFailed(
        f"data.micro_batch_size: {data.micro_batch_size} sequences of up to {data.max_length} "
        "tokens do not fit into the GPU's memory, though every block is checkpointed; accepted: "
        "fewer, a lower data.max_length, a smaller model.quantization, or more ranks"
    )
