"""How many blocks can keep their activations: measured on this machine, not guessed.

A probe runs forward and backward on the largest micro-batch that the data can give, with every
block checkpointed and with one that is not. With f the peak of forward and of the loss, b that of
backward, both with every block checkpointed, and a what a block adds that keeps its activations, n
such blocks need

    max(f + n a, b + (n − 1) a)

bytes: while the last block is differentiated, all of them are held, and its own are in b already.
Where activations may go to the host (`engine.activation_offload`), a third run says what s a block
leaves free whose activations are there, input included, and how long they travel. With m such
blocks, one of which is always on its way, it is

    max(f + (n + 1) a, b + max(n, 1) a) − (m − 1) s

bytes, and of more than one block in (time to travel / time to run) the others would have to wait.

What is left then lets blocks stay whole that would otherwise be gathered for each pass
(`engine.unsharded_blocks`).
"""

import time
from dataclasses import dataclass, replace

import torch

from trainer.config.sections import DataOptions
from trainer.device_memory import GIB, allowance, held_bytes, peak_bytes, readable, release
from trainer.errors import RunFailed
from trainer.model.footprint import blocks_that_fit, update_bytes
from trainer.session import Session
from trainer.tasks.base import Batch, Example, Task


@dataclass(frozen=True)
class Needs:
    """f, b, a and s of the module's formula (bytes), and the most blocks that may move theirs."""

    forward: int
    backward: int
    added: int
    spared: int = 0
    most: int = 0

    def peak(self, saved: int, offloaded: int = 0) -> int:
        """Bytes at the worst moment of a step."""
        travelling = bool(offloaded)
        forward = self.forward + (saved + travelling) * self.added
        backward = self.backward + (max(1, saved) - 1 + travelling) * self.added
        return max(forward, backward) - max(0, offloaded - 1) * self.spared

    def saved(self, blocks: int, offloaded: int, budget: int) -> int:
        """The most blocks beside `moved` ones that can keep their activations; -1 if that is too
        much with none."""
        counts = range(blocks - offloaded, -1, -1)
        return next((saved for saved in counts if self.peak(saved, offloaded) <= budget), -1)

    def offloaded(self, blocks: int, budget: int) -> int:
        """The fewest blocks to move with which as few as can be are computed again."""

        def worth(offloaded: int) -> tuple[int, int]:
            saved = self.saved(blocks, offloaded, budget)
            return (saved + offloaded if saved >= 0 else -1), -offloaded

        return max(range(min(self.most, blocks) + 1), key=worth)


@dataclass(frozen=True)
class Plan:
    """What was decided, and from which figures (bytes, of the rank that has least room)."""

    saved: int
    offloaded: int
    unsharded: int
    blocks: int
    peak: int
    budget: int
    place: int
    """On the host, of all blocks that are moved."""

    def __str__(self) -> str:
        offloaded = f", {self.offloaded} move them to the host ({readable(self.place)})" * bool(
            self.offloaded
        )
        unsharded = f", {self.unsharded} stay whole" * bool(self.unsharded)
        return (
            f"{self.saved} of {self.blocks} blocks keep their activations{offloaded}{unsharded}, "
            f"peak {readable(self.peak)} expected of {readable(self.budget)}"
        )


def make_plan(session: Session, size: int | None = None, batch: Batch | None = None) -> Plan | None:
    """Measure and decide for micro-batches of `size` sequences (none: `data.micro_batch_size`), or
    for `batch`, where `engine.activation_checkpointing` is `auto` on a GPU; the same on every rank.
    What is left then is for `engine.unsharded_blocks`. RunFailed where not even checkpointing every
    block fits."""
    options, device, world = session.config.engine, session.world.device, session.world
    if options.activation_checkpointing != "auto" or device.type != "cuda":
        return None
    blocks = session.backbone.blocks
    data = session.config.data
    longest = data.max_length if data.packing else int(session.train_data.lengths.max())
    batch = batch or largest_batch(session.task, data, longest, size or data.micro_batch_size)
    engine = session.engine
    fills = options.unsharded_blocks == "auto" and engine.supports_unsharded_blocks
    if fills:
        engine.keep_unsharded(0)
    needs, place = _measure(session, batch.to(device))
    release(device)
    budget = allowance(device, options.memory_fraction)
    offloaded = min(world.gather(needs.offloaded(len(blocks), budget)))
    saved = max(0, min(world.gather(needs.saved(len(blocks), offloaded, budget))))
    with world.all_or_none():
        blocks.keep(saved, offloaded, place)
    peak = needs.peak(saved, offloaded)
    if fills:
        share = world.size if session.config.optim.shard_state else 1
        updating = held_bytes(device) + update_bytes(session.optimizer.numel, share)
        left = min(world.gather(budget - max(peak, updating)))
        engine.keep_unsharded(blocks_that_fit(len(blocks), engine.largest_block, left))
        peak += engine.unsharded_blocks * engine.largest_block
    return Plan(
        saved, offloaded, engine.unsharded_blocks, len(blocks), peak, budget, offloaded * place
    )


def _measure(session: Session, batch: Batch) -> tuple[Needs, int]:
    """What blocks need, and the bytes on the host of one that is moved. Where not even one block
    can keep its activations, a is more than there is. All ranks go through the same probes."""
    blocks, world = session.backbone.blocks, session.world
    blocks.keep(0)
    _probe(session, batch)  # compiles
    nothing = _probe(session, batch)
    with world.all_or_none():
        if nothing is None:
            raise oom_error(session)
    assert nothing is not None
    blocks.keep(1)
    one = _probe(session, batch)
    added = torch.cuda.mem_get_info(world.device)[1] if one is None else one.held - nothing.held
    needs = Needs(nothing.forward, nothing.backward, max(1, added))
    room = int(session.config.engine.activation_offload * GIB)
    if room == 0 or not blocks.offloadable or world.any(one is None):
        return needs, 0
    with world.all_or_none():
        blocks.keep(0, 1, min(room, 2 * added))
    away = _probe(session, batch)
    if world.any(away is None or away.offloaded == 0):
        return needs, 0
    assert away is not None
    seconds, running = blocks.host.transfer_seconds(away.offloaded), nothing.seconds / len(blocks)
    most = min(
        room // away.offloaded, int(len(blocks) * running / seconds), len(blocks.offloadable)
    )
    return replace(needs, spared=nothing.held - away.held, most=most), away.offloaded


@dataclass(frozen=True)
class _Probe:
    """Bytes held after forward, peaks of forward and backward, bytes that went to the host; seconds
    of forward."""

    held: int
    forward: int
    backward: int
    offloaded: int
    seconds: float


def _probe(session: Session, batch: Batch) -> _Probe | None:
    """One forward and backward pass; None where the memory does not suffice."""
    device, blocks = session.world.device, session.backbone.blocks
    release(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        loss, _ = session.task.loss(session.model, batch)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        blocks.host.settle()
        held, forward = held_bytes(device), peak_bytes(device)
        offloaded = blocks.host.used
        session.engine.backward(loss)
    except torch.OutOfMemoryError as error:
        if session.engine.collective_gather:  # the others wait for it in the middle of a block
            raise oom_error(session) from error
        session.optimizer.zero_grad()
        return None
    session.optimizer.zero_grad()
    return _Probe(held, forward, peak_bytes(device), offloaded, seconds)


def reduce_plan(session: Session) -> str:
    """After an out-of-memory error: let no block stay whole; then keep the activations of an eighth
    of the blocks fewer; at last move none; and say so. RunFailed where that is not what was asked
    for, or all are computed again already."""
    blocks, engine = session.backbone.blocks, session.engine
    if engine.unsharded_blocks and session.config.engine.unsharded_blocks == "auto":
        engine.keep_unsharded(0)
        release(session.world.device)
        return "out of memory: no block stays whole from here"
    auto, saved, offloaded = (
        session.config.engine.activation_checkpointing,
        blocks.saved,
        blocks.offloaded,
    )
    if auto != "auto" or saved == offloaded == 0:
        raise oom_error(session)
    release(session.world.device)
    blocks.keep(max(0, saved - -(-len(blocks) // 8)), offloaded if saved else 0)
    return f"out of memory: {blocks.saved} of {len(blocks)} blocks keep their activations from here"


def oom_error(session: Session) -> RunFailed:
    """What a user hears of memory that ran out for good."""
    config, blocks = session.config, session.backbone.blocks
    if session.engine.unsharded_blocks:
        return RunFailed(
            f"engine.unsharded_blocks: {config.engine.unsharded_blocks} given, but the GPU's "
            f"memory ran out with {session.engine.unsharded_blocks}; accepted: fewer, or 0"
        )
    if blocks.saved == blocks.offloaded == 0:
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
        f"out with {blocks.saved} of {len(blocks)} blocks keeping their activations; accepted: a "
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
