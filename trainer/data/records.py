"""Converts rows to `Record`s: one per row, or several where the turns of a conversation have to be
learned apart. A row that cannot be used raises `BadRecord` with the reason.
"""

import re
from typing import Any

from trainer.config.data_options import DataOptions
from trainer.data.chats import chats
from trainer.data.messages import no_column
from trainer.errors import BadRecord
from trainer.tasks.base import Record, Task

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def detect_format(row: dict, options: DataOptions, task: Task) -> str:
    """The format of a record: as configured, else by the task and the record's columns."""
    if options.format != "auto":
        return options.format
    if len(task.options.data_formats) == 1:
        return task.options.data_formats[0]
    if options.messages in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    text = options.text if isinstance(options.text, str) else options.text[0]
    needed = _columns_of(options.prompt) | _columns_of(options.completion)
    if text in row and not needed <= row.keys():
        return "text"
    return "prompt_completion"


def to_records(row: dict, kind: str, options: DataOptions, tokenizer: Any) -> list[Record]:
    """Convert a row to `Record`s. Raises BadRecord with the reason."""
    if kind == "messages":
        found = [
            Record(segments, add_bos=False, add_eos=False)
            for segments in chats(row, options, tokenizer)
        ]
    else:
        found = [_record(row, kind, options)]
    try:  # JSON can hold lone surrogates, which no tokenizer accepts
        for record in found:
            "".join([str(record.label), *(text for text, _ in record.segments)]).encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"no Unicode text ({error.reason})") from error
    return found


def _record(row: dict, kind: str, options: DataOptions) -> Record:
    if kind == "classification":
        columns = [options.text] if isinstance(options.text, str) else options.text
        texts = [(_text(row, column), False) for column in columns]
        return Record(texts, label=_text(row, options.label))
    if kind == "alpaca":
        prompt = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
        segments = [(_fill(prompt, row), False), (_text(row, "output"), True)]
    elif kind == "text":
        column = options.text if isinstance(options.text, str) else options.text[0]
        segments = [(_text(row, column), True)]
    else:
        segments = [(_part(options.prompt, row), False), (_part(options.completion, row), True)]
    return Record(segments, add_bos=options.add_bos, add_eos=options.add_eos)


_FIELD = re.compile(r"\{(\w+)\}")


def _columns_of(template: str) -> set[str]:
    return set(_FIELD.findall(template)) or {template}


def _part(template: str, row: dict) -> str:
    """A column's text, or a template with columns filled in."""
    return _fill(template, row) if _FIELD.search(template) else _text(row, template)


def _fill(template: str, row: dict) -> str:
    return _FIELD.sub(lambda match: _text(row, match.group(1)), template)


def _text(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRecord(no_column(column, row) if column not in row else f"{column} is null")
    if not isinstance(value, str | int | float):
        raise BadRecord(f"{column} holds a {type(value).__name__}; accepted: text")
    return str(value)
