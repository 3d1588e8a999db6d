"""The records of a proof, and what their tokens must not be."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from trainer.errors import UserError
from trainer.session import Session
from trainer.tasks.base import Example, Task

SHORT = 64
"""Tokens of a record in `run.verify: auto`, at most."""
_SEARCHED = 32
"""Records among which two that are long enough are searched."""
_TOKENS_CHECKED = 1024
"""Records whose tokens are checked, the first ones."""


def examples(session: Session) -> list[Example]:
    """Two records of the training data (four with `full`), of different lengths, so that padding
    and positions show. Every token but the first is learned."""
    data, options = session.train_data, session.config
    full = options.run.verify == "full"
    longest = options.data.max_length if full else SHORT
    searched = [data[index] for index in range(min(len(data), _SEARCHED))]
    by_length = sorted(searched, key=lambda example: -min(len(example.input_ids), longest))
    chosen = (by_length * 4)[: 4 if full else 2]
    found = [cut(session.task, example, longest) for example in chosen]
    longest, other = (max(map(len, session.task.parts(example).values())) for example in found[:2])
    shorter = max(3, 5 * longest // 6)
    if other > shorter:
        found[1] = cut(session.task, found[1], shorter)
    return found


def cut(task: Task, example: Example, length: int) -> Example:
    """A record whose rows are cut to at most `length` tokens; the last one, by which some models
    pool, stays. An image is not cut."""
    if example.image:
        return example
    rows = [[*row[: min(length, len(row)) - 1], row[-1]] for row in task.parts(example).values()]
    if len(rows) > 1:
        return task.made_up(*rows)
    kept = [*range(min(length, len(example.input_ids)) - 1), -1]
    ids = [example.input_ids[index] for index in kept]
    learned = [0, *[1] * (len(ids) - 1)] if len(example.loss_mask) else ()
    return replace(
        example,
        input_ids=ids,
        loss_mask=learned,
        token_type_ids=[example.token_type_ids[i] for i in kept] if example.token_type_ids else (),
        weight=max(1, sum(learned)),
        reference="",
    )


def changed_at_the_end(task: Task, example: Example) -> tuple[Example, int]:
    """A record of the same length with other tokens from a position of its (last) row on, and this
    position."""
    ids = list(example.input_ids)
    length = len([*task.parts(example).values()][-1])
    start, first = (length + 1) // 2, len(ids) - length
    ids[first + start :] = ids[first : first + length - start]
    return replace(example, input_ids=ids), start


def check_tokens(session: Session) -> None:
    """Raises UserError for a record in which the tokenizer's begin token stands twice in a row, or
    its end token twice at the end of every record."""
    tokenizer, data = session.tokenizer, session.train_data
    count = min(len(data), _TOKENS_CHECKED)
    parts = [session.task.parts(data[index]).values() for index in range(count)]
    rows = [[*of_record][-1] for of_record in parts]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and bos != tokenizer.unk_token_id:
        doubled = next(
            (i for i, of in enumerate(parts) if any(_twice_in_a_row(ids, bos) for ids in of)), None
        )
        if doubled is not None:
            raise UserError(
                f"data.train: record {doubled + 1}: the begin token {tokenizer.bos_token!r} stands "
                "twice in a row: the text, its chat template or the model has one already; "
                "accepted: texts without it, or data.add_bos=false"
            )
    ends = [len(ids) > 1 and ids[-1] == ids[-2] == eos for ids in rows]
    if eos is not None and rows and all(ends):
        raise UserError(
            f"data.train: every record ends in two end tokens {tokenizer.eos_token!r}: the texts "
            "have one already; accepted: texts without it"
        )


def _twice_in_a_row(ids: Sequence[int], token: int) -> bool:
    return any(a == b == token for a, b in itertools.pairwise(ids))
