"""Rows of one file, by its suffix.

A row that cannot be used is a `BadRecord` with the reason; a file that cannot be read is a
`UserError`.
"""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config.data_options import SourceOptions
from trainer.data.extent import Extent
from trainer.errors import BadRecord, UserError, first_line

_BATCH = 1000  # rows read at a time from a parquet file

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")

Row = dict | BadRecord


def read_file(path: Path, options: SourceOptions, extent: Extent) -> Iterator[tuple[int, Row]]:
    """(line or record number from 1, row or BadRecord) of a file. `extent` is told how much of it
    was read."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in SUFFIXES:
        raise UserError(f"{path}: not a data file; accepted: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file; accepted: at least one record")
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, extent), 1)
    elif suffix == ".jsonl":
        yield from _json_lines(path, extent)
    elif suffix == ".json":
        yield from _json_list(path, extent)
    elif suffix == ".txt":
        text = "".join(line for _, line in _lines(path))
        paragraphs = re.split(r"\n\s*\n", text)
        for number, part in enumerate(extent.counted(paragraphs, len(paragraphs)), 1):
            if part.strip():
                yield number, {"text": part.strip()}
    else:
        yield from _delimited(path, "\t" if suffix == ".tsv" else ",", options, extent)


def _lines(path: Path, extent: Extent | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without a byte order mark."""
    extent = extent or Extent()  # of whole texts no part is read before the other
    line = 0
    try:
        with path.open("rb") as file:  # decoded by line: text mode decodes far ahead
            extent.expect(os.fstat(file.fileno()).st_size)
            for line, raw in enumerate(file, 1):
                extent.add(len(raw))
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _json_lines(path: Path, extent: Extent) -> Iterator[tuple[int, Row]]:
    for line, text in _lines(path, extent):
        if not text.strip():
            continue
        try:
            yield line, _as_row(json.loads(text))
        except json.JSONDecodeError as error:
            yield line, BadRecord(f"broken JSON ({error.msg} at character {error.colno})")
        except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
            yield line, BadRecord(f"broken JSON ({error})")


def _json_list(path: Path, extent: Extent) -> Iterator[tuple[int, Row]]:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
        raise UserError(f"{path}: broken JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}; accepted: a list of records")
    yield from enumerate(map(_as_row, extent.counted(rows, len(rows))), 1)


def _delimited(
    path: Path, delimiter: str, options: SourceOptions, extent: Extent
) -> Iterator[tuple[int, Row]]:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if options.quoting == "none" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        (text for _, text in _lines(path, extent)), delimiter=delimiter, quoting=quoting
    )
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


def _parquet_rows(path: Path, extent: Extent) -> Iterator[dict]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        batches = file.iter_batches(batch_size=_BATCH)
        rows = (without_nulls(row) for batch in batches for row in batch.to_pylist())
        yield from extent.counted(rows, file.metadata.num_rows)
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
