"""Whether the blocks run as CUDA graphs (`trainer/model/graphs.py`), by a trial, and their capture.

Graphs hold the memory of a pass through the blocks, beside what the caching allocator keeps for
passes that no graph serves. They are worth it where the CPU launches more slowly than the GPU runs.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from trainer.config.engines import takes
from trainer.data.loader import Loader
from trainer.device_memory import allowance, held_bytes, peak_bytes, readable, release
from trainer.errors import UserError
from trainer.model.graphs import BlocksGraph, Buffers, Call, NoGraph
from trainer.session import Session
from trainer.tasks.base import Batch, Example
from trainer.tasks.documents import Documents

_WAITING = 0.7
"""Of the time of a pass, the part that launching it takes where the GPU waits for it."""


def capture_graphs(session: Session, batches: Sequence[Batch]) -> str | None:
    """Capture a graph for micro-batches of the shapes of each of `batches`, the largest first, as
    `engine.cuda_graphs` says; a line for the log, None if it is false or the device a CPU. Raises
    UserError where `true` cannot be. Gradients are zero before and after."""
    asked, device = session.config.engine.cuda_graphs, session.world.device
    graphs = session.backbone.blocks.graphs
    graphs.forget()
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return None
    started = time.perf_counter()
    skipped, nbytes, reason = 0, 0, _refusal(session, batches)
    if reason is None:
        skipped, nbytes, reason = _attempt(session, batches)
        if reason is not None and _tried:
            graphs.forget()
            _tried.clear()  # trials may differ now, and kernels
            skipped, nbytes, reason = _attempt(session, batches)
    reason = next((r for r in session.world.gather(reason) if r is not None), None)
    if reason is not None:
        graphs.forget()
    release(device)
    with session.world.all_or_none():
        if reason is not None and asked is True:
            raise UserError(
                f"engine.cuda_graphs: true given, but {reason}; accepted: auto or false"
            )
    if reason is not None:
        return f"none: {reason}"
    left = f", {skipped} more keep the GPU busy without" if skipped else ""
    return (
        f"CUDA graphs of {len(graphs)} row length{'s' * (len(graphs) > 1)}{left}, "
        f"{readable(nbytes)}, captured in {time.perf_counter() - started:.1f} s"
    )


def _attempt(session: Session, batches: Sequence[Batch]) -> tuple[int, int, str | None]:
    """(what `_capture` returns, why there are no graphs). What a failed attempt held is free."""
    try:
        with session.casts.fresh():  # as in a step
            return *_capture(session, batches), None
    except NoGraph as error:
        return 0, 0, str(error)
    finally:
        session.optimizer.zero_grad()


def _refusal(session: Session, batches: Sequence[Batch]) -> str | None:
    """Why graphs cannot serve, as far as that shows without a trial."""
    config, blocks, device = session.config, session.backbone.blocks, session.world.device
    if device.type != "cuda" or torch.version.hip is not None:
        return f"on {'ROCm' if device.type == 'cuda' else device.type} there are none"
    if not takes(session.engine.kind, "cuda_graphs"):
        return f"engine.kind={session.engine.kind} moves the weights of blocks"
    if config.method.trains != "adapters":
        return f"method.kind={config.method.kind} trains more than adapters"
    if blocks.saved < len(blocks):
        return "not all blocks keep their activations"
    if config.method.dropout > 0:
        return f"method.dropout={config.method.dropout} draws anew in every step"
    if drops := _dropout(session.model):
        return f"the model drops at random ({drops})"
    if blocks.has_trained_parameters:
        return "blocks have trained parameters beside adapters"
    if not batches:
        return (
            f"rows of task.kind={config.task.kind} are of any form (data.row_lengths, "
            "data.micro_batch_tokens)"
        )
    return None


def _dropout(model: nn.Module) -> str | None:
    """What the model drops in training: the key of its configuration, or a kind of layer."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float) and value > 0 and "classifier" not in key:
            return f"{key}={value}"
    layers = (type(m).__name__ for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0)
    return next(layers, None)


def _capture(session: Session, batches: Sequence[Batch]) -> tuple[int, int]:
    """(number of batches that keep the GPU busy without a graph, bytes of all graphs). Raises
    NoGraph, for want of memory or of need on every rank."""
    config, world = session.config.engine, session.world
    graphs, device = session.backbone.blocks.graphs, world.device
    stream = _stream(device)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    passes: list[BlocksGraph] = []
    trials: list[_Trial] = []
    buffers = None
    lacks = False
    try:
        for batch in batches:
            calls = _record(session, batch, passes[0] if passes else None)
            buffers = buffers or Buffers(calls)
            graph = BlocksGraph(calls, buffers)
            calls.clear()  # they hold the recorded pass's activations
            passes.append(graph)
            trials.append(_trial(session, graph, stream, first=len(passes) == 1))
    except torch.OutOfMemoryError:  # the other ranks are told below
        lacks = True
    needed, above = (
        max(values, default=0) for values in ([t.nbytes for t in trials], [t.above for t in trials])
    )
    peak = max(peak_bytes(device), held_bytes(device) + above)
    lacks = lacks or peak + needed > allowance(device, config.memory_fraction)
    if world.any(lacks):
        raise NoGraph(f"the memory does not suffice for {readable(needed)} more")
    of_ranks = world.gather([trial.launching for trial in trials])
    launching = [min(shares) for shares in zip(*of_ranks, strict=True)]
    chosen = [
        graph
        for graph, share in zip(passes, launching, strict=True)
        if config.cuda_graphs is True or share >= _WAITING
    ]
    if not chosen:
        raise NoGraph(f"the GPU is busy without (launching takes {max(launching):.0%} of a pass)")
    release(device)
    at_start, pool = torch.cuda.memory_reserved(device), torch.cuda.graph_pool_handle()
    for graph in chosen:
        graph.capture(stream, pool)
        graphs.add(graph)
    return len(trials) - len(chosen), torch.cuda.memory_reserved(device) - at_start


@dataclass(frozen=True)
class _Trial:
    """What is known of a pass that is not captured yet, run as the blocks are."""

    launching: float
    """Time to launch it over its whole time."""
    nbytes: int
    """That it needs."""
    above: int
    """Peak bytes of all trials so far beside what was held before."""


_tried: dict[tuple[object, ...], _Trial] = {}
"""Trials of this process that had the GPU wait; their kernels are loaded."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of all captures of a process, so that the workspaces of cuBLAS, which belong to a stream, are
    there once they were tried."""
    return torch.cuda.Stream(device)


def _record(session: Session, batch: Batch, like: BlocksGraph | None) -> list[Call]:
    """The blocks' calls in a forward pass; `like`: the graph of such a pass of another size."""
    batch = batch.to(session.world.device)
    with session.backbone.blocks.graphs.recording(like) as calls:
        session.task.loss(session.model, batch)
    return calls


def _trial(
    session: Session, graph: BlocksGraph, stream: torch.cuda.Stream, *, first: bool
) -> _Trial:
    """That of an earlier run of this process whose blocks ran the same kernels, else a new one."""
    config, adapters = session.config, session.method.adapters.values()
    key = (
        str(session.world.device), config.model.model_dump_json(), config.engine.model_dump_json(),
        config.method.kind, *sorted({(a.rank, a.g.requires_grad) for a in adapters}),
        *graph.shapes,
    )  # fmt: skip
    if (known := _tried.get(key)) is not None:
        return known
    trial = _try(graph, stream, first=first)
    # Ranks that knew different ones would wait for each other; one that was busy may not be again.
    if session.world.size == 1 and trial.launching >= _WAITING:
        _tried[key] = trial
    return trial


def _try(graph: BlocksGraph, stream: torch.cuda.Stream, *, first: bool) -> _Trial:
    """A pass on the stream of the capture, which loads kernels; with `first` twice, the second one
    timed."""
    device = graph.x.device
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Not torch's own generator, which a capture that failed may leave unusable.
        graph.x.normal_(generator=torch.Generator(device))
        graph.dy.zero_()
        for _ in range(1 + first):
            torch.cuda.synchronize(device)
            before, started = held_bytes(device), time.perf_counter()
            graph.run_forward()
            held = held_bytes(device)
            graph.run_backward()
            launched = time.perf_counter() - started
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
    return _Trial(launched / seconds, held - before, peak_bytes(device) - before)


def row_batches(session: Session, loader: Loader) -> list[Batch]:
    """A micro-batch of each frequent row length, the longest first; none where rows are of any
    length or number, or the task's are not of text alone. Rows of other lengths run as they are."""
    rows, size = loader.rows, loader.micro_batch_size
    packs = session.config.task.supports_packing
    if not rows.lengths or not (rows.end_to_end or (packs and size is not None)):
        return []
    made = []
    for length in reversed(rows.frequent):
        documents = [length]
        if rows.end_to_end or loader.options.packing:
            longest = max(1, min(rows.longest, length // 2))
            documents = [longest] * (length // longest) + [length % longest] * (
                length % longest > 0
            )
        examples = [Example([1] * n, [0, *[1] * (n - 1)], weight=n - 1) for n in documents]
        count = 1 if rows.end_to_end else size or 1
        batch = session.task.collate([examples] * count, width=length)
        if batch.documents is not None:
            batch.documents = _with_room(batch.documents, count * rows.documents, rows.longest)
        made.append(batch)
    return made


def _with_room(documents: Documents, count: int, longest: int) -> Documents:
    """With empty documents behind, up to `count`, and as for documents of `longest` tokens."""
    known = documents.boundaries
    room = known[-1:].expand(max(0, count + 1 - len(known)))
    return replace(
        documents,
        boundaries=torch.cat([known, room]),
        longest=max(documents.longest, 2 ** (longest - 1).bit_length()),
    )
