"""The forward pass against the unmodified model's, block by block.

The run's model computes its records as it trains on them, packed into one row, padded together, or
both in turn, without adapters. The reference computes each alone. After every block the hidden
states of every record must agree, and so must the loss. Where they do not, the run's model computes
each record alone too: if that agrees, the records influence each other; if not, the calls of all
modules in the first block that differs are compared. Where a plain block does not fit beside it,
the run's model is at least compared with itself on each record alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.token_rows import frozen_tables
from adapters.units import transformer_blocks
from trainer.device_memory import readable, release
from trainer.errors import UserError
from trainer.model.added_tokens import vocabulary
from trainer.model.backbone import class_name
from trainer.session import Session
from trainer.tasks.base import IGNORED, Batch, Example
from trainer.verification.calls import Calls, recorded, relative_error
from trainer.verification.compare import Fault, Result, Tolerance, find_fault
from trainer.verification.examples import changed_at_the_end
from trainer.verification.localise import localise
from trainer.verification.reference import Reference, computing

Sequences = list[list[Example]]
"""Rows of a batch, each of one record or of several packed ones."""

_BUFFERS = 1.5
"""Memory of a pass of the reference, in plain blocks."""


def check_forward(
    session: Session, reference: Reference, examples: list[Example], against: list[str]
) -> str | None:
    """The fault that the forward pass shows, or None. Appends to `against` with what it was
    compared where the reference did not fit. Collective. Raises UserError for records that
    influence each other, in a row or by padding, or a model that attends to what it predicts."""
    world, dtype = session.world, session.backbone.dtype
    room = _room(session) - _logits_bytes(session, examples)
    with as_verified(session):
        if room < _BUFFERS * reference.block_bytes(dtype):
            against.append(
                f"the same records alone (not against {against[0]}: a block without quantisation "
                f"takes {readable(reference.block_bytes(dtype))}, and {readable(max(room, 0))} are "
                "free)"
            )
            _check_among_themselves(session, examples)
            return None
        expected = _alone(session, reference, examples, dtype)
        noise = None
        if dtype != torch.float32 and room > _BUFFERS * reference.block_bytes(torch.float32):
            noise = _alone(session, reference, examples, torch.float32)
        for way, batches in arrangements(session, examples).items():
            together = _joined([_ours(session, sequences) for sequences in batches])
            found = find_fault(session, together, expected, noise)
            if not world.any(found is not None):
                continue
            alone = _joined([_ours(session, [[example]]) for example in examples])
            own = find_fault(session, alone, expected, noise)
            if world.any(own is not None):
                return _own_fault(session, reference, examples, own)
            if way != "padded":
                raise _leak(session, together, alone, found)
            padded = _padded(session, reference, examples)
            theirs = not world.any(find_fault(session, together, padded, noise) is not None)
            raise _padding(session, together, alone, found, theirs=theirs)
        return None


def _check_among_themselves(session: Session, examples: list[Example]) -> None:
    """Raises UserError where records that are put together influence each other. Needs no plain
    block. Collective."""
    alone = _joined([_ours(session, [[example]]) for example in examples])
    for way, batches in arrangements(session, examples).items():
        together = _joined([_ours(session, sequences) for sequences in batches])
        found = find_fault(session, together, alone, None)
        if session.world.any(found is not None):
            if way != "padded":
                raise _leak(session, together, alone, found)
            raise _padding(session, together, alone, found, theirs=None)


def _logits_bytes(session: Session, examples: list[Example]) -> int:
    """Bytes of the logits of all records, in float32, and of what a loss makes of them."""
    tokens = sum(len(example.input_ids) for example in examples)
    return 4 * 4 * tokens * (vocabulary(session.backbone.model) or 0)


def arrangements(session: Session, examples: list[Example]) -> dict[str, list[Sequences]]:
    """The batches in which a run puts records together, by the name of the way. Rows of packed
    records are padded too, unless they lie end to end."""
    ways: dict[str, list[Sequences]] = {}
    end_to_end, size = session.backbone.rows.end_to_end, session.config.data.micro_batch_size
    packs = session.config.packs_rows
    if packs or end_to_end:
        ways["packed" if packs else "end to end"] = [[examples]]
    several = size is None or session.method.largest_micro_batch(size) > 1
    several = several or session.backbone.rows.few > 0  # rows are padded to few lengths
    if several and not end_to_end:
        ways["padded"] = [[[example] for example in examples]]
    return ways or {"one by one": [[[example]] for example in examples]}


def _own_fault(
    session: Session, reference: Reference, examples: list[Example], own: Fault | None
) -> str | None:
    """Where a record alone goes wrong. Collective."""
    world = session.world
    faults = world.gather(None if own is None else vars(own))
    found = Fault(**next(fault for fault in faults if fault is not None))
    if found.path is None:
        return None if own is None else (
            f"{own.text}; the hidden states after every block agree: the fault lies behind "
            "them, in the last norm, the output head or the loss"
        )  # fmt: skip
    batch = session.task.collate([[examples[found.record]]]).to(world.device)
    theirs = reference.run(batch.inputs, session.backbone.dtype, found.path).calls
    with recorded(_blocks(session), found.path) as calls:
        session.task.loss(session.model, batch)
    cause = localise(found.path, calls, theirs, found.allowed)
    return None if own is None else f"{cause} ({own.text})"


@contextmanager
def as_verified(session: Session) -> Iterator[None]:
    """Context without adapters, trained rows, dropout, gradients and compiled programs."""
    adapters = session.method.adapters
    held = {name: adapters.layers[name].adapter for name in adapters}
    was_training = session.model.training
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(session.method.without())
        stack.enter_context(session.backbone.blocks.uncompiled())
        stack.enter_context(frozen_tables(session.backbone.token_rows))
        try:
            for name in held:
                adapters.layers[name].adapter = None
            session.model.eval()
            yield
        finally:
            session.model.train(was_training)
            for name, adapter in held.items():
                adapters.layers[name].adapter = adapter


def _room(session: Session) -> int:
    """Free bytes of the rank that has the fewest; unlimited on a CPU. Collective."""
    device, room = session.world.device, 2**62
    if device.type == "cuda":
        release(device)
        room = torch.cuda.mem_get_info(device)[0]
    return min(session.world.gather(room))


def _blocks(session: Session) -> dict[str, torch.nn.Module]:
    return dict(transformer_blocks(session.model))


def _ours(session: Session, sequences: Sequences) -> Result:
    """The run's model on records as `Task.collate` puts them together."""
    batch = session.task.collate(sequences).to(session.world.device)
    outputs: list[Tensor] = []
    handle = session.model.register_forward_hook(
        lambda model, inputs, output: outputs.append(session.task.logits(output).detach())
    )
    try:
        with recorded(_blocks(session)) as calls, computing(session):
            loss, _ = session.task.loss(session.model, batch)
    finally:
        handle.remove()
    spans = [
        (row, sum(len(e.input_ids) for e in packed[:place]), len(example.input_ids))
        for row, packed in enumerate(sequences)
        for place, example in enumerate(packed)
    ]
    examples = [example for packed in sequences for example in packed]
    hidden = _hidden(session, calls, batch, spans, examples)
    learned_tokens = batch.targets.shape == session.task.shape(batch)
    logits = [] if learned_tokens else _by_record(outputs[0], spans)
    return Result(
        [call.path for call in calls], hidden, float(loss) if learned_tokens else None, logits
    )


def _alone(
    session: Session, reference: Reference, examples: Sequence[Example], dtype: torch.dtype
) -> Result:
    """The reference on every record alone. Raises UserError where a causal model's first tokens
    depend on later ones."""
    parts = []
    for number, example in enumerate(examples):
        changed, start = changed_at_the_end(session.task, example)
        batch = session.task.collate([[example]]).to(session.world.device)
        learned_tokens = batch.targets.shape == session.task.shape(batch)
        inputs = batch.inputs
        if learned_tokens and number == 0:
            inputs = session.task.collate([[example], [changed]]).to(session.world.device).inputs
        done = reference.run(inputs, dtype)
        if learned_tokens and number == 0:
            seen = relative_error(done.logits[1, :start], done.logits[0, :start])
            if session.world.any(not seen <= 10 * Tolerance.of(session).hidden):
                raise UserError(
                    f"task.kind: {session.config.task.kind} given, but "
                    f"{class_name(session.model)} attends to the tokens that it is to predict: "
                    f"what follows a token changes its logits by {seen:.0%}; accepted: a causal "
                    "model, or another task.kind"
                )
        spans, rows = [(0, 0, len(example.input_ids))], len(next(iter(inputs.values())))
        hidden = _hidden(session, done.calls, batch, spans, [example], rows)
        loss = _loss(done.logits[:1], batch) if learned_tokens else None
        parts.append(
            Result([c.path for c in done.calls], hidden, loss,
                   [] if learned_tokens else _by_record(done.logits, spans))
        )  # fmt: skip
    return _joined(parts)


def _padded(session: Session, reference: Reference, examples: Sequence[Example]) -> Result:
    """The reference on the records padded together, with a mask made here."""
    parts = [session.task.parts(example) for example in examples]
    batch = session.task.collate([[example] for example in examples])
    inputs = dict(batch.inputs)
    if "input_ids" in batch.inputs:
        inputs = {
            name: _rows([of_one[name] for of_one in parts], session.task.pad_token_id)
            for name in parts[0]
        }
    if "token_type_ids" in batch.inputs:
        inputs["token_type_ids"] = _rows([e.token_type_ids for e in examples], 0)
    if "attention_mask" in batch.inputs:
        inputs["attention_mask"] = _rows([[1] * len(one["input_ids"]) for one in parts], 0)
    batch = replace(batch, inputs=inputs).to(session.world.device)
    done = reference.run(batch.inputs, session.backbone.dtype)
    spans = [(row, 0, len(example.input_ids)) for row, example in enumerate(examples)]
    hidden = _hidden(session, done.calls, batch, spans, examples)
    learned_tokens = batch.targets.shape == session.task.shape(batch)
    return Result(
        [call.path for call in done.calls],
        hidden,
        _loss(done.logits, batch) if learned_tokens else None,
        [] if learned_tokens else _by_record(done.logits, spans),
    )


def _by_record(logits: Tensor, spans: list[tuple[int, int, int]]) -> list[Tensor]:
    """The logits of each record: of its row, or of its tokens (rows, tokens, outputs)."""
    if logits.dim() == 2:
        return list(logits[: len(spans)])
    return [logits[row, start : start + length] for row, start, length in spans]


def _rows(values: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, values))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])


def _joined(parts: list[Result]) -> Result:
    """Results of single records as one."""
    hidden = [[one for of_part in of_block for one in of_part]
              for of_block in zip(*(part.hidden for part in parts), strict=False)]  # fmt: skip
    losses = [part.loss for part in parts if part.loss is not None]
    return Result(
        parts[0].paths,
        hidden,
        sum(losses) if losses else None,
        [row for part in parts for row in part.logits],
    )


def _loss(logits: Tensor, batch: Batch) -> float:
    """Summed cross entropy of the next token, by torch alone."""
    targets = batch.targets[:, 1:]
    return float(
        F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum",
            ignore_index=IGNORED,
        )
    )  # fmt: skip


def _hidden(
    session: Session,
    calls: Calls,
    batch: Batch,
    spans: Sequence[tuple[int, int, int]],
    examples: Sequence[Example],
    rows: int | None = None,
) -> list[list[Tensor | None]]:
    """By block and record, the hidden states (tokens, width) of the record's tokens; of one with a
    row for each stack, those of the row that the block reads."""
    parts = [session.task.parts(example) for example in examples]
    found: list[list[Tensor | None]] = []
    for call in calls:
        decodes = len(parts[0]) > 1 and "decoder" in call.path.split(".")
        name = [*parts[0]][-1 if decodes else 0]
        count, width = batch.inputs[name].shape if len(parts[0]) > 1 else session.task.shape(batch)
        shape = (count if rows is None else rows, width)
        output = call.output
        known = output is not None and output.dim() == 3 and tuple(output.shape[:2]) == shape
        found.append([
            output[row, start : start + len(part[name])] if known and output is not None else None
            for (row, start, _), part in zip(spans, parts, strict=True)
        ])  # fmt: skip
    return found


def _leak(session: Session, together: Result, alone: Result, fault: Fault | None) -> UserError:
    """The error for records of a row that change each other's results."""
    data = session.config.data
    key = "data.packing: true" if data.packing else f"data.padding_free: {data.padding_free}"
    return UserError(
        f"{key} given, but the records of a row see each other in "
        f"{class_name(session.model)}{_change(together, alone, fault)}; accepted: false"
    )


def _padding(
    session: Session,
    together: Result,
    alone: Result,
    fault: Fault | None,
    *,
    theirs: bool | None,
) -> UserError:
    """The error for records that padding changes; `theirs`: in transformers' own model too, None
    where that was not compared."""
    data = session.config.data
    given, key, one = data.micro_batch_size, "data.micro_batch_size", "1"
    if given is None:
        given, key = data.micro_batch_tokens, "data.micro_batch_tokens"
        one = "null and data.micro_batch_size=1"
    elif given == 1 and session.backbone.rows.few:
        given, key, one = session.backbone.rows.few, "data.row_lengths", "0"
    elif given == 1:  # the method makes it larger later
        given = session.method.largest_micro_batch(given)
        key = "method.policy.after_selection.micro_batch_size"
    how = f"{class_name(session.model)}{_change(together, alone, fault)}"
    if theirs is not False:
        also = ", as it does in transformers' own model" if theirs else ""
        return UserError(
            f"{key}: {given} given, but padding changes the results of {how}{also}; accepted: "
            f"{one}, which needs no padding"
        )
    return UserError(
        f"{key}: {given} given, but records that are padded together change each other in {how}, "
        "which they do not in transformers' own model: the mask of the padding is wrong; "
        f"accepted: {one}"
    )


def _change(together: Result, alone: Result, fault: Fault | None) -> str:
    where = "" if fault is None or fault.path is None else f", from {fault.path} on"
    if together.loss is None or not alone.loss:
        return where
    return f" (their loss changes by {abs(together.loss / alone.loss - 1):.2%}){where}"
