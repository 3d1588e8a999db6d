"""Reads files and hub data sets row by row, and converts the rows to `Record`s: one per row, or
several where the turns of a conversation have to be learned apart.

A row that cannot be used is a `BadRecord` with the reason; a file that cannot be read is a
`UserError`.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.data.chats import chats
from trainer.data.messages import no_column
from trainer.errors import BadRecord, UserError, first_line
from trainer.tasks.base import Record, Task

_BATCH = 1000  # rows read at a time from a parquet file


LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


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


def read_rows(
    source: str, split: str, options: DataOptions, limit: int | None
) -> Iterator[tuple[int, dict | BadRecord]]:
    """(line or record number from 1, row or BadRecord) of a file or a hub data set."""
    return itertools.islice(_all_rows(source, split, options), limit)


def _all_rows(
    source: str, split: str, options: DataOptions
) -> Iterator[tuple[int, dict | BadRecord]]:
    path, suffix = local(source), Path(source).suffix.lower()
    if path is None:
        if suffix in LOCAL_SUFFIXES or source.count("/") != 1 or source.startswith((".", "/")):
            raise UserError(
                f"{source}: no such file; accepted: a {', '.join(LOCAL_SUFFIXES)} file or a hub id"
            )
        yield from enumerate(_hub_rows(source, split, options), 1)
        return
    if not path.is_file() or suffix not in LOCAL_SUFFIXES:
        raise UserError(f"{source}: not a data file; accepted: {', '.join(LOCAL_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{source}: empty file; accepted: at least one record")
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
    elif suffix == ".jsonl":
        yield from _json_lines(path)
    elif suffix == ".json":
        yield from _json_list(path)
    elif suffix == ".txt":
        text = "".join(line for _, line in _lines(path))
        paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text))
        yield from ((number, {"text": part}) for number, part in enumerate(paragraphs, 1) if part)
    else:
        yield from _delimited(path, "\t" if suffix == ".tsv" else ",", options)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without a byte order mark."""
    line = 0
    try:
        with path.open("rb") as file:  # decoded by line: text mode decodes far ahead
            for line, raw in enumerate(file, 1):
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict | BadRecord]]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            yield line, _as_row(json.loads(text))
        except json.JSONDecodeError as error:
            yield line, BadRecord(f"broken JSON ({error.msg} at character {error.colno})")
        except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
            yield line, BadRecord(f"broken JSON ({error})")


def _json_list(path: Path) -> Iterator[tuple[int, dict | BadRecord]]:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
        raise UserError(f"{path}: broken JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}; accepted: a list of records")
    yield from ((number, _as_row(row)) for number, row in enumerate(rows, 1))


def _delimited(
    path: Path, delimiter: str, options: DataOptions
) -> Iterator[tuple[int, dict | BadRecord]]:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if options.quoting == "none" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, quoting=quoting)
    names = options.columns
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = cells
            elif len(cells) != len(names):
                yield reader.line_num, BadRecord(f"{len(cells)} columns, expected {len(names)}")
            else:
                yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH):
            yield from map(_without_nulls, batch.to_pylist())
    except Exception as error:  # Arrow's types, and Python's for unsupported values
        raise UserError(f"{path}: no parquet file ({first_line(error)})") from error


def _hub_rows(source: str, split: str, options: DataOptions) -> Iterable[dict]:
    import datasets

    try:
        rows = datasets.load_dataset(source, options.subset, split=split, revision=options.revision)
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"{source}: neither a local file nor a data set that the hub gives "
            f"({first_line(error)})"
        ) from error
    return map(_without_nulls, rows)


def _without_nulls(row: dict) -> dict:
    """A row of Arrow without the nulls in its structs. Arrow gives all structs of a column the same
    keys, so that a tool call would get the arguments of all others."""
    return {column: _filled(value) for column, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _as_row(value: Any) -> dict | BadRecord:
    return value if isinstance(value, dict) else BadRecord(f"a JSON {type(value).__name__}")


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
