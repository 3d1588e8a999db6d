"""Rows of one file, by its suffix.

A row that cannot be used is a `BadRecord` with the reason; a file that cannot be read is a
`UserError`.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config.data_options import SourceOptions
from trainer.errors import BadRecord, UserError, first_line

_BATCH = 1000  # rows read at a time from a parquet file

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")

Row = dict | BadRecord


def read_file(path: Path, options: SourceOptions) -> Iterator[tuple[int, Row]]:
    """(line or record number from 1, row or BadRecord) of a file."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in SUFFIXES:
        raise UserError(f"{path}: not a data file; accepted: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file; accepted: at least one record")
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


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            yield line, _as_row(json.loads(text))
        except json.JSONDecodeError as error:
            yield line, BadRecord(f"broken JSON ({error.msg} at character {error.colno})")
        except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
            yield line, BadRecord(f"broken JSON ({error})")


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
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


def _delimited(path: Path, delimiter: str, options: SourceOptions) -> Iterator[tuple[int, Row]]:
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
            yield from map(without_nulls, batch.to_pylist())
    except Exception as error:  # Arrow's types, and Python's for unsupported values
        raise UserError(f"{path}: no parquet file ({first_line(error)})") from error


def without_nulls(row: dict) -> dict:
    """A row of Arrow without the nulls in its structs. Arrow gives all structs of a column the same
    keys, so that a tool call would get the arguments of all others."""
    return {column: _filled(value) for column, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _as_row(value: Any) -> Row:
    return value if isinstance(value, dict) else BadRecord(f"a JSON {type(value).__name__}")
