"""Prompts: the beginning of records, texts as they are, and conversations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.data_options import DataOptions, SourceOptions
from trainer.data.formats import columns_of, detect_format, messages_column, to_records
from trainer.data.readers import Row
from trainer.data.templates import limited, render, stops, template_of
from trainer.errors import BadRecord, UserError
from trainer.tasks.base import Example, Record, Task
from trainer.tasks.tokenisation import special_tokens, tokenise

_ANY = 2**31  # tokens: no limit
_ANSWER = "a"


@dataclass(frozen=True)
class Prompt:
    """What the model continues."""

    ids: list[int]
    reference: str | None = None
    """What the data has in this place, if anything."""
    row: Mapping[str, Any] | None = None
    """The row that it was made of."""


def of_text(text: str, options: SourceOptions, task: Task) -> Prompt:
    """A text as it is, behind the begin token where records have one. Raises UserError."""
    ((ids, _),) = tokenise(task.tokenizer, [[(text, False)]])
    before, _ = special_tokens(task.tokenizer, options.add_bos, False)
    ids = ids if ids[: len(before)] == before else [*before, *ids]
    if not ids:
        raise UserError("--prompt: no token in it; accepted: a text that is not empty")
    return Prompt(ids)


def of_messages(messages: list[dict], options: SourceOptions, tokenizer: Any) -> Prompt:
    """A conversation, up to where the assistant answers. Raises BadRecord, UserError."""
    template = template_of(tokenizer, options, None)
    with limited():
        text, _ = render(tokenizer, template, messages, None, True)
    ((ids, _),) = tokenise(tokenizer, [[(text, False)]])
    return Prompt(ids)


def of_rows(rows: Iterator[tuple[str, Row]], options: DataOptions, task: Task) -> Iterator[Prompt]:
    """The prompts of (place, row) pairs, each up to its last answer, which it may lack; plain texts
    as they are. Raises UserError with the place of a row that cannot be used."""
    for place, row in rows:
        try:
            if isinstance(row, BadRecord):
                raise row
            full, lacks = _with_answer(row, options)
            last = options.model_copy(update={"turns": "last"})
            kind = detect_format(full, last, task)
            *_, record = to_records(full, kind, last, task.tokenizer)
            is_prompt = (bool(text) and not learned for text, learned in record.segments)
            if kind == "text":  # of which all is learned
                found = of_text("".join(text for text, _ in record.segments), options, task)
            elif any(is_prompt):
                found = _of_record(record, lacks, options, task)
            else:
                raise BadRecord("nothing before its answer; accepted: records with a prompt")
            yield replace(found, row=row)
        except BadRecord as reason:
            raise UserError(f"{place}: {reason}") from reason


def _of_record(record: Record, lacks_answer: bool, options: DataOptions, task: Task) -> Prompt:
    (example,) = task.encode([record], _ANY)
    if isinstance(example, str):
        raise BadRecord(example)
    assert isinstance(example, Example), "a task that generates makes one example of a record"
    ids, answer = task.prompt_of(example)
    _, ends = stops(task.tokenizer, options)
    return Prompt(ids, None if lacks_answer else text_of(answer, task.tokenizer, ends))


def text_of(ids: Sequence[int], tokenizer: Any, stop: Sequence[str] = ()) -> str:
    """Text of an answer's tokens up to a text that ends it, without special tokens."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text[: min((text.index(one) for one in stop if one in text), default=None)]


def _with_answer(row: dict, options: SourceOptions) -> tuple[dict, bool]:
    """(the row with something in place of an answer that it lacks, whether it lacks it). What
    stands there begins as answers do, so that it is not merged with the prompt's last token."""
    column = messages_column(row, options)
    messages = row.get(column)
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        role = "role" if "role" in messages[-1] else "from"
        names = (options.roles or {}).get("assistant", [])
        if messages[-1].get(role) in ("assistant", "gpt", *names):
            return row, False
        content = "content" if role == "role" else "value"
        said = {role: "assistant" if role == "role" else "gpt", content: _ANSWER}
        return {**row, column: [*messages, said]}, True
    if "instruction" in row and "output" not in row and options.format in ("auto", "alpaca"):
        return {**row, "output": _ANSWER}, True
    missing = [name for name in columns_of(options.completion) if row.get(name) is None]
    prompts = [str(row.get(name, "")) for name in sorted(columns_of(options.prompt))]
    if not missing or "output" in row:
        return row, False
    spaced = options.prompt[-1:].isspace() or (prompts and prompts[-1][-1:].isspace())
    answer = _ANSWER if spaced else f" {_ANSWER}"
    return {**row, **dict.fromkeys(missing, answer)}, True
