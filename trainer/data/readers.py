"""Rows of one file, by its suffix.

A row that cannot be used is a `BadRecord` with the reason; a file that cannot be read is a
`UserError`.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from trainer.config.data_options import SourceOptions
from trainer.data import squad
from trainer.data.extent import Extent
from trainer.errors import BadRecord, UserError, first_line, reason

_BATCH = 1000  # rows read at a time from a parquet file

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
FILES = f"{', '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSED)}"
"""The files that are read, in words."""

Row = dict | BadRecord


def ending(path: Path) -> str:
    """`.jsonl`, or with its compression `.jsonl.gz`; empty: not a data file."""
    endings = (suffix + packed for suffix in SUFFIXES for packed in ("", *COMPRESSED))
    return next((found for found in endings if path.name.lower().endswith(found)), "")


def read_file(path: Path, options: SourceOptions, extent: Extent) -> Iterator[tuple[int, Row]]:
    """(line or record number from 1, row or BadRecord) of a file. `extent` is told how much of it
    was read."""
    suffix = Path(ending(path)).stem  # without that of a compression
    if not suffix or not path.is_file():
        raise UserError(f"{path}: not a data file; accepted: {FILES}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file; accepted: at least one record")
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, extent), 1)
    elif suffix == ".jsonl":
        yield from _json_lines(path, extent)
    elif suffix == ".json":
        yield from (_json_lines if _is_lines(path) else _json_list)(path, extent)
    elif suffix == ".txt":
        yield from _paragraphs(path, extent)
    else:
        yield from _delimited(path, "\t" if suffix == ".tsv" else ",", options, extent)


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, extent: Extent):
        super().__init__(path)
        self._extent = extent
        extent.expect(os.fstat(self.fileno()).st_size)

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self._extent.add(len(found))
        return found

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._extent.add(count)
        return count


@contextmanager
def _open(path: Path, extent: Extent) -> Iterator[io.BufferedReader]:
    """A file's bytes, decompressed."""
    compression = COMPRESSED.get(path.suffix.lower())
    with _Counted(path, extent) as file:
        if compression is None:
            yield io.BufferedReader(file)
            return
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) as stream:
            yield io.BufferedReader(stream)


def _lines(path: Path, extent: Extent | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without a byte order mark."""
    line = 0
    try:
        # Of a text that is parsed whole, no part is read before the others.
        with _open(path, extent or Extent()) as file:
            for line, raw in enumerate(file, 1):  # text mode would decode far ahead
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})") from error
    except OSError as error:  # also of a compressed file that is damaged
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def _paragraphs(path: Path, extent: Extent) -> Iterator[tuple[int, Row]]:
    """The paragraphs of a text, which blank lines separate, each with the line it starts at."""
    start = 0
    lines: list[str] = []
    for number, line in _lines(path, extent):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, {"text": "".join(lines).strip()}
            lines = []
    if lines:
        yield start, {"text": "".join(lines).strip()}


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


def _is_lines(path: Path) -> bool:
    """Whether a file called .json holds an object a line, as .jsonl does."""
    first = next((text for _, text in _lines(path) if text.strip()), "")
    try:
        found = json.loads(first) if first.lstrip().startswith("{") else None
        return isinstance(found, dict) and not squad.is_official(found)
    except (ValueError, RecursionError):
        return False


def _json_list(path: Path, extent: Extent) -> Iterator[tuple[int, Row]]:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        mixed = error.msg == "Extra data"
        more = "; accepted: one list of records, or an object a line" if mixed else ""
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}){more}") from error
    except (ValueError, RecursionError) as error:  # a huge number, or nested too deep
        raise UserError(f"{path}: broken JSON ({error})") from error
    if squad.is_official(rows):
        rows = list(squad.official_rows(rows))
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a JSON {type(rows).__name__}; accepted: a list of records, or an object a "
            "line"
        )
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
        content: Path | io.BytesIO = path
        if path.suffix.lower() in COMPRESSED:  # whole in memory: it is read from its end
            with _open(path, Extent()) as stream:
                content = io.BytesIO(stream.read())
        file = pq.ParquetFile(content)
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
