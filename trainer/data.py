"""Records on disk or on the hub, brought to one form, tokenised once and kept as an Arrow file.

`prepare` returns a `TokenDataset` that is memory-mapped: the ranks of a node share its pages.
What cannot be used is reported as file, line and reason.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trainer.config import DataOptions
from trainer.errors import UserError
from trainer.tasks.base import Example, Record, Task

LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_CHUNK = 1000  # records tokenised in one call
_VERSION = 1  # of the cached form; raise it when `Example` or an encoding changes

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.int8()),
        "token_type_ids": pa.list_(pa.int8()),
        "label": pa.float64(),
        "weight": pa.int32(),
    }
)

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


@dataclasses.dataclass
class Counts:
    """What became of the records of one source."""

    records: int = 0
    used: int = 0
    truncated: int = 0
    dropped: int = 0
    bad: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.used} of {self.records} records, {self.tokens} tokens "
            f"({self.truncated} truncated, {self.dropped} dropped, {self.bad} bad)"
        )


class TokenDataset:
    """Tokenised records, memory-mapped."""

    def __init__(self, table: pa.Table, counts: Counts):
        self.counts = counts
        # By chunk, as they lie in the file: joining the chunks would copy them into memory.
        chunks = [chunk for chunk in table.to_batches() if len(chunk)]
        self._first = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._chunks = [
            {
                name: (chunk.column(name).offsets.to_numpy(), chunk.column(name).values.to_numpy())
                for name in ("input_ids", "loss_mask", "token_type_ids")
            }
            for chunk in chunks
        ]
        self.lengths = np.concatenate([np.diff(lists["input_ids"][0]) for lists in self._chunks])
        self.weights = table.column("weight").to_numpy()
        self.labels = table.column("label").to_numpy()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return Example(
            input_ids=self._list("input_ids", index),
            loss_mask=self._list("loss_mask", index),
            token_type_ids=self._list("token_type_ids", index),
            label=float(self.labels[index]),
            weight=int(self.weights[index]),
        )

    def _list(self, name: str, index: int) -> list[int]:
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        offsets, values = self._chunks[chunk][name]
        start, stop = offsets[index - self._first[chunk] :][:2]
        return values[start:stop].tolist()


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason."""


def read_labels(source: str, split: str, options: DataOptions) -> list[str | float]:
    """The raw labels of a classification source; bad records end the run or are left out."""
    labels = []
    for line, row in read_rows(source, split, options, options.train_records):
        try:
            if isinstance(row, BadRecord):
                raise row
            label = to_record(row, "classification", options, None).label
        except BadRecord as reason:
            if options.on_bad_record == "stop":
                raise _stop(source, line, reason) from reason
            continue
        assert label is not None
        labels.append(label)
    if not labels:
        raise UserError(f"{source}: no usable record; accepted: at least one")
    return labels


def _stop(source: str, line: int, reason: object) -> UserError:
    return UserError(f"{source}:{line}: {reason} (data.on_bad_record=skip leaves such records out)")


def prepare(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task
) -> TokenDataset:
    """Tokenise `source`, or take it from the cache. Call it on one rank of a node first."""
    key = _cache_key(source, split, limit, options, task)
    folder = _cache_root(options) / key
    if not (folder / "counts.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"data.cache: {folder.parent}: {error.strerror}; accepted: a folder to write into"
            ) from error
        try:
            counts = _tokenise(source, split, limit, options, task, partial / "tokens.arrow")
            (partial / "counts.json").write_text(json.dumps(dataclasses.asdict(counts)))
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / "counts.json").exists():  # else another run was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    counts = Counts(**json.loads((folder / "counts.json").read_text()))
    with pa.memory_map(str(folder / "tokens.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    return TokenDataset(table, counts)


def _tokenise(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task, path: Path
) -> Counts:
    counts = Counts()
    rows = read_rows(source, split, options, limit)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            kept = list(_encode_chunk(source, chunk, options, task, counts))
            columns = {name: [getattr(example, name) for example in kept] for name in _SCHEMA.names}
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    if counts.records == 0:
        raise UserError(f"{source}: no records; accepted: at least one")
    if counts.used == 0:
        raise UserError(f"{source}: no usable record ({counts})")
    return counts


def _encode_chunk(
    source: str,
    chunk: list[tuple[int, dict | BadRecord]],
    options: DataOptions,
    task: Task,
    counts: Counts,
) -> Iterator[Example]:
    """The usable examples of some rows; everything else is counted, or ends the run."""
    records: list[Record | BadRecord] = []
    for _, row in chunk:
        try:
            if isinstance(row, BadRecord):
                raise row
            records.append(
                to_record(row, detect_format(row, options, task), options, task.tokenizer)
            )
        except BadRecord as reason:
            records.append(reason)
    encoded = iter(task.encode([r for r in records if isinstance(r, Record)], options.max_length))
    for (line, _), record in zip(chunk, records, strict=True):
        counts.records += 1
        example = str(record) if isinstance(record, BadRecord) else next(encoded)
        if isinstance(example, str):
            if options.on_bad_record == "stop":
                raise _stop(source, line, example)
            counts.bad += 1
            continue
        if example.truncated:
            if options.on_long_record == "stop":
                raise UserError(
                    f"{source}:{line}: longer than data.max_length ({options.max_length} tokens); "
                    "accepted: shorter records, or data.on_long_record=truncate or drop"
                )
            if options.on_long_record == "drop":
                counts.dropped += 1
                continue
            counts.truncated += 1
        counts.used += 1
        counts.tokens += len(example.input_ids)
        yield example


def detect_format(row: dict, options: DataOptions, task: Task) -> str:
    """The format of a record: as configured, else by the task and the record's columns."""
    if options.format != "auto":
        return options.format
    if task.options.kind == "sequence_classification":
        return "classification"
    if options.messages in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    text = options.text if isinstance(options.text, str) else options.text[0]
    needed = _columns_of(options.prompt) | _columns_of(options.completion)
    if text in row and not needed <= row.keys():
        return "text"
    return "prompt_completion"


def to_record(row: dict, kind: str, options: DataOptions, tokenizer: Any) -> Record:
    """One row in the project's one form. Raises BadRecord with the reason."""
    if kind == "classification":
        columns = [options.text] if isinstance(options.text, str) else options.text
        texts = [(_text(row, column), False) for column in columns]
        return Record(texts, label=_text(row, options.label))
    if kind == "alpaca":
        prompt = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
        return Record([(_fill(prompt, row), False), (_text(row, "output"), True)])
    if kind == "text":
        column = options.text if isinstance(options.text, str) else options.text[0]
        return Record([(_text(row, column), True)])
    if kind == "messages":
        return Record(_chat(row, options.messages, tokenizer), special_tokens=False)
    return Record([(_part(options.prompt, row), False), (_part(options.completion, row), True)])


def _chat(row: dict, column: str, tokenizer: Any) -> list[tuple[str, bool]]:
    """Segments of a conversation as the chat template renders it; assistant turns are learned."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRecord(_no_column(column, row) if column not in row else f"{column}: no messages")
    if not getattr(tokenizer, "chat_template", None):
        raise BadRecord("the tokenizer has no chat template; accepted: a model that has one")
    done, segments = "", []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRecord(f"{column}[{index}]: no message with role and content")
        if message["role"] != "assistant":
            continue
        opened = _render(tokenizer, messages[:index], True)
        closed = _render(tokenizer, messages[: index + 1], False)
        if not opened.startswith(done) or not closed.startswith(opened):
            raise BadRecord("the chat template rewrites earlier turns; their loss cannot be told")
        segments += [(opened[len(done) :], False), (closed[len(opened) :], True)]
        done = closed
    if not segments:
        raise BadRecord(f"{column}: no assistant message")
    return segments


def _render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template raises whatever its author chose
        reason = " ".join(str(error).split()) or repr(error)
        raise BadRecord(f"the chat template refuses it: {reason}") from error


def read_rows(
    source: str, split: str, options: DataOptions, limit: int | None
) -> Iterator[tuple[int, dict | BadRecord]]:
    """(line or record number from 1, row or what is wrong with it) of a file or a hub data set."""
    return itertools.islice(_all_rows(source, split, options), limit)


def _all_rows(
    source: str, split: str, options: DataOptions
) -> Iterator[tuple[int, dict | BadRecord]]:
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.exists():
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
        with path.open("rb") as file:  # decoded by line: a text file decodes far ahead of it
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
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_CHUNK):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: no parquet file ({str(error).splitlines()[0]})") from error


def _hub_rows(source: str, split: str, options: DataOptions) -> Iterable[dict]:
    import datasets

    try:
        return datasets.load_dataset(source, options.subset, split=split, revision=options.revision)
    except Exception as error:  # the hub client raises a score of types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{source}: neither a local file nor a data set that the hub gives ({reason})"
        ) from error


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
        raise BadRecord(_no_column(column, row) if column not in row else f"{column} is null")
    if not isinstance(value, str | int | float):
        raise BadRecord(f"{column} holds a {type(value).__name__}; accepted: text")
    return str(value)


def _no_column(column: str, row: dict) -> str:
    return f"no column {column!r}; there are {', '.join(map(str, row)) or 'none'}"


def _cache_root(options: DataOptions) -> Path:
    if options.cache is not None:
        return Path(options.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankcast"


def _cache_key(source: str, split: str, limit: int | None, options: DataOptions, task: Task) -> str:
    """Everything that the tokenised form depends on, and nothing that only batching does."""
    path = Path(source)
    content = _digest(path) if path.is_file() else f"{options.subset} {options.revision} {split}"
    batching = {"packing", "shuffle", "batch_size", "micro_batch_size", "cache", "train", "eval"}
    limits = {"train_records", "eval_records"}
    parts = [
        _VERSION,
        source,
        content,
        limit,
        options.model_dump(exclude=batching | limits),
        task.options.model_dump(),
        task.labels_state(),
        _tokenizer_state(task.tokenizer),
        task.tokenizer.chat_template,
        [task.pad_token_id, task.tokenizer.bos_token_id, task.tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
