"""Plan how many blocks keep, offload or recompute their activations, from measurements.

Probes run forward and backward on the largest micro-batch that the data can give, with every block
checkpointed and with one that is not. Let f be the peak of forward and the loss, b that of
backward, both with every block checkpointed, and a the bytes added by a block that keeps its
activations. Then n such blocks need

    max(f + n a, b + (n − 1) a)

bytes: the activations of all n are held while the last block is differentiated, and its own are
part of b. With `engine.activation_offload`, a third probe measures s, the bytes freed by a block
that offloads its activations, input included, and the time of their copy. With m such blocks, one
of which is always in flight, a step needs

    max(f + (n + 1) a, b + max(n, 1) a) − (m − 1) s

bytes. At most one block in (time to copy / time to run a block) is offloaded, else copies would
delay the step.

Where a small part of the memory is enough for all activations, one probe of such a step tells so.

The memory left then holds unsharded blocks (`engine.unsharded_blocks`), which are not gathered in
each pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.rows import Rows
from trainer.device_memory import GIB, allowance, held_bytes, peak_bytes, readable, release
from trainer.engine.sharded_optimizer import ShardedOptimizer
from trainer.errors import RunFailed
from trainer.model.compilations import Compilations
from trainer.model.footprint import blocks_that_fit, update_bytes
from trainer.session import Session
from trainer.tasks.base import Batch, Task

_KEPT = 32
"""Activations that a block keeps, over its input, are expected to be no more."""


@dataclass(frozen=True)
class Needs:
    """f, b, a and s of the module's formulas (bytes), and the most blocks that may offload."""

    forward: int
    backward: int
    added: int
    freed: int = 0
    most: int = 0

    def peak(self, saved: int, offloaded: int = 0) -> int:
        """Peak bytes of a step."""
        in_flight = bool(offloaded)
        forward = self.forward + (saved + in_flight) * self.added
        backward = self.backward + (max(1, saved) - 1 + in_flight) * self.added
        return max(forward, backward) - max(0, offloaded - 1) * self.freed

    def saved(self, blocks: int, offloaded: int, budget: int) -> int:
        """The most blocks that can keep their activations while `offloaded` others offload theirs;
        -1 if `budget` does not suffice even for none."""
        counts = range(blocks - offloaded, -1, -1)
        return next((saved for saved in counts if self.peak(saved, offloaded) <= budget), -1)

    def offloaded(self, blocks: int, budget: int) -> int:
        """The fewest blocks to offload with which the number of recomputed blocks is minimal."""

        def worth(offloaded: int) -> tuple[int, int]:
            saved = self.saved(blocks, offloaded, budget)
            return (saved + offloaded if saved >= 0 else -1), -offloaded

        return max(range(min(self.most, blocks) + 1), key=worth)


@dataclass(frozen=True)
class Plan:
    """The plan, and the bytes it is based on (of the rank with the least room)."""

    saved: int
    offloaded: int
    unsharded: int
    blocks: int
    peak: int
    budget: int
    host_bytes: int
    """Of the buffers of all offloaded blocks."""

    def __str__(self) -> str:
        parts = [f"{self.saved} of {self.blocks} blocks keep their activations"]
        if self.offloaded:
            parts.append(f"{self.offloaded} offload them to the host ({readable(self.host_bytes)})")
        if self.unsharded:
            parts.append(f"{self.unsharded} stay unsharded")
        parts.append(f"expected peak {readable(self.peak)} of {readable(self.budget)}")
        return ", ".join(parts)


def make_plan(session: Session, size: int | None = None, batch: Batch | None = None) -> Plan | None:
    """Measure and apply a plan for micro-batches of `size` sequences (default
    `data.micro_batch_size`), or for `batch`. None unless `engine.activation_checkpointing` is
    `auto` and the device a GPU. Collective; the same plan on every rank. Raises RunFailed where a
    step does not fit even with every block checkpointed."""
    options, device, world = session.config.engine, session.world.device, session.world
    if options.activation_checkpointing != "auto" or device.type != "cuda":
        return None
    blocks = session.backbone.blocks
    data = session.config.data
    if batch is None:
        size = size or data.micro_batch_size
        rows = session.backbone.rows
        lengths = longest_lengths(session.train_data, session.task, rows, size)
        batch = largest_batch(session.task, data, rows, lengths, size)
    engine = session.engine
    plans_unsharded = options.unsharded_blocks == "auto" and engine.supports_unsharded_blocks
    if plans_unsharded:
        engine.keep_unsharded(0)
    batch = batch.to(device)
    if (whole := _peak_with_all(session, batch)) is not None:
        return Plan(len(blocks), 0, 0, len(blocks), *whole, host_bytes=0)
    needs, buffer_bytes = _measure(session, batch)
    release(device)
    budget = allowance(device, options.memory_fraction)
    offloaded = min(world.gather(needs.offloaded(len(blocks), budget)))
    saved = max(0, min(world.gather(needs.saved(len(blocks), offloaded, budget))))
    with world.all_or_none():
        blocks.keep(saved, offloaded, buffer_bytes)
    peak = needs.peak(saved, offloaded)
    if plans_unsharded:
        sharded = isinstance(session.optimizer, ShardedOptimizer)
        share = world.size if sharded or session.config.optim.shard_state else 1
        updating = held_bytes(device) + update_bytes(session.optimizer.numel, share)
        left = min(world.gather(budget - max(peak, updating)))
        engine.keep_unsharded(blocks_that_fit(len(blocks), engine.largest_block, left))
        peak += engine.unsharded_blocks * engine.largest_block
    host_bytes = offloaded * buffer_bytes
    return Plan(saved, offloaded, engine.unsharded_blocks, len(blocks), peak, budget, host_bytes)


def _peak_with_all(session: Session, batch: Batch) -> tuple[int, int] | None:
    """(peak, budget) of a step in which all blocks keep their activations, where half of the budget
    is enough: a small model needs one probe, and none of it is compiled to be recomputed. None
    where it is not, nor expected to be, and where engines move blocks. Collective."""
    engine, blocks, world = session.engine, session.backbone.blocks, session.world
    if engine.supports_unsharded_blocks or engine.collective_gather:
        return None
    config = session.backbone.model.config.get_text_config()
    width, tokens = getattr(config, "hidden_size", None), batch.inputs.get("input_ids")
    if width is None or tokens is None:
        return None
    budget = min(world.gather(allowance(world.device, session.config.engine.memory_fraction)))
    hidden = tokens.numel() * width * session.backbone.dtype.itemsize
    if _KEPT * hidden * len(blocks) > budget / 2:
        return None
    blocks.keep(len(blocks))
    with Compilations() as compiled:
        probe = _probe(session, batch)
    if probe is not None and compiled.total:  # which may take memory too
        probe = _probe(session, batch)
    release(world.device)
    peak = None if probe is None else max(probe.forward, probe.backward)
    if world.any(peak is None or peak > budget / 2):
        return None
    return max(world.gather(peak)), budget


def _measure(session: Session, batch: Batch) -> tuple[Needs, int]:
    """The needs, and the bytes of an offloaded block's host buffer. If not even one block can keep
    its activations, a is the GPU's whole memory. All ranks run the same probes. Raises RunFailed
    where not even checkpointing every block fits."""
    blocks, world = session.backbone.blocks, session.world
    blocks.keep(0)
    _probe(session, batch)  # the first run compiles
    base = _probe(session, batch)
    with world.all_or_none():
        if base is None:
            raise oom_error(session)
    assert base is not None
    added = 0  # by the kind of blocks of which it is most: a decoder's rows may be shorter
    for index in blocks.last_of_stacks:
        blocks.keep_only(index)
        one = _probe(session, batch)
        found = torch.cuda.mem_get_info(world.device)[1] if one is None else one.held - base.held
        added = max(added, found)
        if world.any(one is None):
            return Needs(base.forward, base.backward, max(1, added)), 0
    needs = Needs(base.forward, base.backward, max(1, added))
    room = int(session.config.engine.activation_offload * GIB)
    if room == 0 or not blocks.offloadable:
        return needs, 0
    with world.all_or_none():
        blocks.keep(0, 1, min(room, 2 * added))
    off = _probe(session, batch)
    if world.any(off is None or off.offloaded == 0):
        return needs, 0
    assert off is not None
    copy_seconds = blocks.host.transfer_seconds(off.offloaded)
    block_seconds = base.seconds / len(blocks)
    most = min(
        room // off.offloaded,
        int(len(blocks) * block_seconds / copy_seconds),
        len(blocks.offloadable),
    )
    return replace(needs, freed=base.held - off.held, most=most), off.offloaded


@dataclass(frozen=True)
class _Probe:
    """Bytes held after forward, peaks of forward and backward, bytes offloaded; seconds of
    forward."""

    held: int
    forward: int
    backward: int
    offloaded: int
    seconds: float


def _probe(session: Session, batch: Batch) -> _Probe | None:
    """Measure one forward and backward pass. None where the memory does not suffice; RunFailed
    instead if blocks are gathered by collectives."""
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
        if session.engine.collective_gather:  # the others are blocked in a gather
            raise oom_error(session) from error
        session.optimizer.zero_grad()
        return None
    session.optimizer.zero_grad()
    return _Probe(held, forward, peak_bytes(device), offloaded, seconds)


def reduce_plan(session: Session) -> str:
    """Reduce memory after an out-of-memory error: no CUDA graphs; keep no block unsharded; next
    time, checkpoint an eighth of the blocks more; at last, offload none. Returns a line for the
    log. Raises RunFailed where the configuration rules that out, or all blocks are checkpointed
    already."""
    blocks, engine = session.backbone.blocks, session.engine
    if len(blocks.graphs) and session.config.engine.cuda_graphs == "auto":
        blocks.graphs.forget()
        release(session.world.device)
        return "out of memory: no CUDA graphs from here"
    if engine.unsharded_blocks and session.config.engine.unsharded_blocks == "auto":
        engine.keep_unsharded(0)
        release(session.world.device)
        return "out of memory: no block stays unsharded from here"
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
    """The error for an out-of-memory condition that no plan avoids."""
    config, blocks = session.config, session.backbone.blocks
    if session.engine.unsharded_blocks:
        return RunFailed(
            f"engine.unsharded_blocks: {config.engine.unsharded_blocks} given, but the GPU's "
            f"memory ran out with {session.engine.unsharded_blocks}; accepted: fewer, or 0"
        )
    if blocks.saved == blocks.offloaded == 0:
        size = session.method.micro_batch_size or config.data.micro_batch_size
        if size is None:
            given = f"data.micro_batch_tokens: {config.data.micro_batch_tokens} tokens do"
        else:
            given = (
                f"data.micro_batch_size: {size} sequences of up to {config.data.max_length} tokens "
                "do"
            )
        return RunFailed(
            f"{given} not fit into the GPU's memory, though every block is checkpointed; accepted: "
            "fewer, a lower data.max_length, a smaller model.quantization, or more ranks"
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


def longest_lengths(records: TokenDataset, task: Task, rows: Rows, size: int | None) -> list[int]:
    """Tokens of the `size` longest records (None: one), descending; of the longest source and
    target where these have rows of their own."""
    if rows.source_apart:
        return rows.widths(records.lengths, records.weights).max(0).tolist()
    lengths = records.lengths
    if task.options.records_together:
        every = records.whole_records(np.arange(len(lengths)))
        lengths = np.array([lengths[record].sum() for record in every])
    return np.sort(lengths)[::-1][: size or 1].tolist()


def largest_batch(
    task: Task, data: DataOptions, rows: Rows, lengths: Sequence[int], size: int | None
) -> Batch:
    """The largest micro-batch of `size` sequences (None: of `data.micro_batch_tokens`), all with a
    loss. `lengths`: of the longest records, descending; of the longest source and target where
    these have rows of their own. A packed sequence is two documents of `data.max_length` together,
    which need a mask."""
    longest, tokens = lengths[0], data.micro_batch_tokens
    token = int(task.pad_token_id == 0)  # any but padding
    if rows.source_apart:
        whole = sum(lengths)
        count = size or -(-(tokens or whole) // whole)
        room = whole if tokens is None else tokens // count
        example = task.made_up(*([token] * max(2, n * room // whole) for n in lengths))
        return task.collate([[example]] * count)
    if data.packing:
        whole = data.max_length
        documents, longest = [whole // 2, whole - whole // 2], whole
    elif task.options.records_together:
        documents = [longest // 2, longest - longest // 2]
    else:
        documents = [longest]
    if size is None:
        assert tokens is not None
        # The fewest rows that hold so many tokens, padding included.
        count = 1 if rows.end_to_end else -(-tokens // longest)
        sequences = [_cut(documents, tokens // count)] * count
        if rows.end_to_end:
            sequences = [_cut(documents * -(-tokens // longest), tokens)]
    elif rows.end_to_end and not data.packing:
        sequences = [[length] for length in (*lengths, *[longest] * size)[:size]]
    else:
        sequences = [documents] * size
    examples = [[task.made_up([token] * n) for n in of_row] for of_row in sequences]
    laid = rows.laid(examples)
    width = max(sum(len(example.input_ids) for example in row) for row in laid)
    return task.collate(laid, width=rows.fitted((), width).rounded(width))


def _cut(documents: list[int], tokens: int) -> list[int]:
    """The first documents that hold `tokens` tokens, the last one cut to them."""
    ends = np.minimum(np.cumsum(documents), tokens)
    return [int(n) for n in np.diff(ends, prepend=0) if n > 0]
