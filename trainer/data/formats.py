"""Converts rows to `Record`s: one per row, or several where the turns of a conversation have to be
learned apart. A row that cannot be used raises `BadRecord` with the reason.
"""

import re
from collections.abc import Iterator
from typing import Any

from trainer.config.data_options import SourceOptions
from trainer.data.chats import chats
from trainer.data.choices import commonsense, multiple_choice
from trainer.data.images import encoded_image
from trainer.data.messages import Conversation, conversation, from_json, no_column, tools_of
from trainer.data.squad import question_answering
from trainer.errors import BadRecord
from trainer.tasks.base import Record, Task

_SHAREGPT = "conversations"
"""ShareGPT's column of messages."""
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)

Given = tuple[str, Any, bool]
"""A message: (name, as the data has it, whether it may be learned)."""


def detect_format(row: dict, options: SourceOptions, task: Task) -> str:
    """The format of a record: as configured, else by the task and the record's columns. Raises
    BadRecord for records of another task."""
    if options.format != "auto":
        return options.format
    if len(task.options.data_formats) == 1:
        return task.options.data_formats[0]
    if "commonsense" in task.options.data_formats:
        is_commonsense = {"instruction", "output", "answer"} <= row.keys()
        return "commonsense" if is_commonsense else "multiple_choice"
    _refuse_preferences(row, options)
    if messages_column(row, options) in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    text = options.text if isinstance(options.text, str) else options.text[0]
    needed = columns_of(options.prompt) | columns_of(options.completion)
    if text in row and not needed <= row.keys():
        return "text"
    return "prompt_completion"


def _refuse_preferences(row: dict, options: SourceOptions) -> None:
    """Pairs of answers, or answers with a judgement (KTO): trained as if all were good they would
    teach the bad ones too."""
    used = {options.messages} | columns_of(options.prompt) | columns_of(options.completion)
    if {"chosen", "rejected"} <= row.keys() and not used & {"chosen", "rejected"}:
        raise BadRecord(
            "chosen and rejected are a preference pair, and there is no preference training; "
            "accepted: one answer, as with data.completion=chosen (data.messages=chosen for a chat)"
        )
    judged = {"prompt", "completion", "label"} <= row.keys() and "label" not in used
    if judged and str(row["label"]).lower() in ("true", "false"):
        raise BadRecord(
            f"label {row['label']!r} judges a completion, and there is no preference training; "
            "accepted: data.format=prompt_completion to train on all completions alike"
        )


def to_records(row: dict, kind: str, options: SourceOptions, tokenizer: Any) -> list[Record]:
    """Convert a row to `Record`s. Raises BadRecord with the reason."""
    chat = _conversation(row, kind, options)
    if chat is not None:
        found = [
            Record(segments, add_bos=False, add_eos=False)
            for segments in chats(chat, options, tokenizer)
        ]
    elif kind == "multiple_choice":
        _refuse_chat_options(kind, options)
        found = multiple_choice(row, options, _part)
    elif kind == "commonsense":
        _refuse_chat_options(kind, options)
        *_, (asked, _), _ = _alpaca(row, options, tokenizer)
        found = commonsense(row, options, _part, asked)
    elif kind == "images":
        _refuse_chat_options(kind, options)
        image = encoded_image(row, options.image)
        found = [Record([], label=raw_label(row, options), image=image)]
    elif kind == "question_answering":
        _refuse_chat_options(kind, options)
        found = [question_answering(row)]
    else:
        found = [_record(row, kind, options, tokenizer)]
    try:  # JSON can hold lone surrogates, which no tokenizer accepts
        for record in found:
            "".join([str(record.label), *(text for text, _ in record.segments)]).encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"no Unicode text ({error.reason})") from error
    return found


# --- conversations


def _conversation(row: dict, kind: str, options: SourceOptions) -> Conversation | None:
    """The conversation of a row; None for a row that goes through no chat template."""
    asked = columns_of(options.prompt)
    system = None if kind == "prompt_completion" and "system" in asked else _system(row)
    if kind == "messages":
        given = _messages(row, messages_column(row, options))
    elif kind == "prompt_completion" and _is_conversational(row, options):
        given = [(name, message, False) for name, message, _ in _messages(row, options.prompt)]
        given += _messages(row, options.completion)
    elif kind == "prompt_completion" and options.as_chat:
        prompt, completion = _part(options.prompt, row), _part(options.completion, row)
        given = [_said("user", "prompt", prompt), _said("assistant", "completion", completion)]
    elif kind == "alpaca" and options.as_chat:
        asked_for = [
            _text(row, "instruction"),
            *([_text(row, "input")] if row.get("input") else []),
        ]
        history = _history(row)
        given = [
            _said(role, f"history[{index}]", text)
            for index, pair in enumerate(history)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        given.append(_said("user", "instruction", "\n".join(asked_for)))
        given.append(_said("assistant", "output", _text(row, "output")))
    else:
        return None
    tools = tools_of(row.get(options.tools), options.tools)
    return conversation(given, system or options.system, tools, options)


def _said(role: str, name: str, text: str) -> Given:
    return name, {"role": role, "content": text}, True


def messages_column(row: dict, options: SourceOptions) -> str:
    """The column of messages: the configured one, or else ShareGPT's."""
    default = SourceOptions.model_fields["messages"].default
    if options.messages == default and default not in row and _SHAREGPT in row:
        return _SHAREGPT
    return options.messages


def _messages(row: dict, column: str) -> list[Given]:
    """The messages of a column that holds a list of them, or its JSON text."""
    if column not in row:
        raise BadRecord(no_column(column, row))
    messages = _list(row, column)
    if not messages:
        raise BadRecord(f"{column}: no messages")
    return [(f"{column}[{index}]", message, True) for index, message in enumerate(messages)]


def _is_conversational(row: dict, options: SourceOptions) -> bool:
    """Whether prompt and completion are lists of messages. Raises BadRecord where only one is."""
    found = [_is_messages(row.get(column)) for column in (options.prompt, options.completion)]
    if any(found) and not all(found):
        raise BadRecord(
            f"{options.prompt} or {options.completion} is a list of messages, the other is none; "
            "accepted: two texts, or two lists"
        )
    return all(found)


def _is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)
    )


def _list(row: dict, column: str) -> list:
    """A list, or the JSON text of one, as csv files have it; of nothing, none."""
    value = row.get(column)
    value = from_json(value) if isinstance(value, str) and value.strip() else value or []
    if isinstance(value, str):
        python = " (it looks like Python's notation)" if value.lstrip().startswith("[") else ""
        raise BadRecord(f"{column}: a text that is no JSON{python}; accepted: a list, or its JSON")
    if not isinstance(value, list):
        raise BadRecord(f"{column} holds a {type(value).__name__}; accepted: a list")
    return value


def _history(row: dict) -> list[tuple[str, str]]:
    """Alpaca's earlier turns: pairs of what was asked and what was answered."""
    found = []
    for index, pair in enumerate(_list(row, "history")):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRecord(f"history[{index}]: accepted: a pair of texts, [asked, answered]")
        found.append((pair[0], pair[1]))
    return found


def _system(row: dict) -> str | None:
    """The system message of a row that has a column of it."""
    return None if row.get("system") in (None, "") else _text(row, "system")


# --- texts


def _record(row: dict, kind: str, options: SourceOptions, tokenizer: Any) -> Record:
    if kind != "alpaca":
        _refuse_chat_options(kind, options)
    if kind == "classification":
        columns = [options.text] if isinstance(options.text, str) else options.text
        texts = [(_text(row, column), False) for column in columns]
        return Record(texts, label=raw_label(row, options))
    if kind == "alpaca":
        segments = list(_alpaca(row, options, tokenizer))
    elif kind == "text":
        column = options.text if isinstance(options.text, str) else options.text[0]
        if _is_messages(row.get(column)):
            raise BadRecord(f"{column} holds messages; accepted: data.messages={column}")
        segments = [(_text(row, column), True)]
    else:
        segments = [(_part(options.prompt, row), False), (_part(options.completion, row), True)]
    return Record(segments, add_bos=options.add_bos, add_eos=options.add_eos)


def raw_label(row: dict, options: SourceOptions) -> str:
    """The label of a row, as the data has it. Raises BadRecord."""
    return _text(row, options.label)


def _alpaca(row: dict, options: SourceOptions, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Alpaca's own form, whose preamble the system message replaces. Earlier answers end in the end
    token, as the last one does."""
    has_input = bool(row.get("input"))
    preamble = _system(row) or options.system or (_ALPACA_WITH_INPUT if has_input else _ALPACA)
    end = "" if options.add_eos is False else tokenizer.eos_token or ""
    before = preamble + "\n\n"
    for asked, answered in _history(row):
        yield f"{before}### Instruction:\n{asked}\n\n### Response:\n", False
        yield answered + end, options.turns != "last"
        before = "\n\n"
    given = f"### Input:\n{_text(row, 'input')}\n\n" if has_input else ""
    asked = _text(row, "instruction")
    yield f"{before}### Instruction:\n{asked}\n\n{given}### Response:\n", False
    yield _text(row, "output"), True


def _refuse_chat_options(kind: str, options: SourceOptions) -> None:
    """Raises BadRecord where a record goes through no chat template, but is asked to."""
    if options.as_chat:
        raise BadRecord(
            f"data.as_chat: true given, but a record of format {kind} has no turns; accepted: "
            "false, or records with prompt and completion, instruction and output, or messages"
        )
    if options.system is not None:
        raise BadRecord(
            f"data.system: given, but a record of format {kind} has no system message; accepted: "
            "null, or data.as_chat=true for prompts and completions"
        )


_FIELD = re.compile(r"\{(\w+)\}")


def columns_of(template: str) -> set[str]:
    return set(_FIELD.findall(template)) or {template}


def _part(template: str, row: dict) -> str:
    """A column's text, or a template with columns filled in."""
    return _fill(template, row) if _FIELD.search(template) else _text(row, template)


def _fill(template: str, row: dict) -> str:
    """The template with columns filled in; of a list of texts (MBPP's tests), one a line."""

    def text(match: re.Match[str]) -> str:
        column = match.group(1)
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return "\n".join(value)
        return _text(row, column)

    return _FIELD.sub(text, template)


def _text(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRecord(no_column(column, row) if column not in row else f"{column} is null")
    if not isinstance(value, str | int | float):
        raise BadRecord(f"{column} holds a {type(value).__name__}; accepted: text")
    if value != value:  # what pandas writes for a text that is missing
        raise BadRecord(f"{column} is NaN; accepted: text")
    return str(value)
