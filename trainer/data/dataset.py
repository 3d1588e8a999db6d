"""Tokenised records, cached as a memory-mapped Arrow file that the ranks of a node share.

Records that cannot be used are reported with file, line and reason.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.config.yaml import parse_json
from trainer.data.records import detect_format, to_records
from trainer.data.sources import read_rows
from trainer.errors import BadRecord, UserError, first_line, reason
from trainer.files import sha256
from trainer.tasks.base import Example, Record, Task

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 1000  # records tokenised in one call
_VERSION = 2  # of the cached file; raise it when `Example` or an encoding changes


@functools.cache
def _schema() -> "pa.Schema":
    """The columns of the cached file."""
    import pyarrow as pa

    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.int8()),
            "token_type_ids": pa.list_(pa.int8()),
            "label": pa.float64(),
            "weight": pa.int32(),
            "record": pa.int32(),
        }
    )


@dataclasses.dataclass
class Counts:
    """Numbers of records (rows) of one source, by outcome, and of the examples and tokens made of
    them."""

    records: int = 0
    used: int = 0
    examples: int = 0
    truncated: int = 0
    turns_dropped: int = 0
    """Examples of used records that do not fit."""
    dropped: int = 0
    bad: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        examples = f"{self.examples} examples, " if self.examples != self.used else ""
        turns = f"{self.turns_dropped} turns dropped, " if self.turns_dropped else ""
        return (
            f"{self.used} of {self.records} records, {examples}{self.tokens} tokens "
            f"({self.truncated} truncated, {turns}{self.dropped} dropped, {self.bad} bad)"
        )


class TokenDataset:
    """Tokenised records, memory-mapped: examples, of which a record gives one or several."""

    def __init__(self, table: "pa.Table", counts: Counts, key: str = ""):
        self.counts = counts
        self.key = key  # digest of the records and of how they were tokenised
        # By chunk, as in the file: joining the chunks would copy them into memory.
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
        self.records = table.column("record").to_numpy()  # of each example; ascending, from 0

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

    def first_records(self, examples: np.ndarray, count: int) -> np.ndarray:
        """Those of `examples`, given record by record, that belong to the first `count` records."""
        is_next = np.diff(self.records[examples], prepend=-1) != 0
        return examples[np.cumsum(is_next) <= count]

    def _list(self, name: str, index: int) -> list[int]:
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        offsets, values = self._chunks[chunk][name]
        start, stop = offsets[index - self._first[chunk] :][:2]
        return values[start:stop].tolist()


def read_labels(source: str, split: str, options: DataOptions) -> list[str | float]:
    """The raw labels of a classification source. Bad records raise UserError or are skipped."""
    labels = []
    for line, row in read_rows(source, split, options, options.train_records):
        try:
            if isinstance(row, BadRecord):
                raise row
            (record,) = to_records(row, "classification", options, None)
        except BadRecord as reason:
            if options.on_bad_record == "stop":
                raise _stop(source, line, reason) from reason
            continue
        assert record.label is not None
        labels.append(record.label)
    if not labels:
        raise UserError(f"{source}: no usable record; accepted: at least one")
    return labels


def _stop(source: str, line: int, reason: object) -> UserError:
    return UserError(f"{source}:{line}: {reason} (data.on_bad_record=skip leaves such records out)")


def prepare(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task
) -> TokenDataset:
    """Tokenise `source`, or read it from the cache. Call it on one rank of each node first. Raises
    UserError."""
    key = _cache_key(source, split, limit, options, task)
    folder = _entry(cache_root(options), key)
    if local(folder / "counts.json", "data.cache") is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(f"{key}.{secrets.token_hex(8)}")  # its mode is the umask's
            partial.mkdir()
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
        except OSError as error:
            raise UserError(
                f"data.cache: {folder.parent}: cannot be written ({reason(error)})"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    import pyarrow as pa

    try:
        counts = Counts(**parse_json((folder / "counts.json").read_text()))
        with pa.memory_map(str(folder / "tokens.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
        if table.schema != _schema():
            raise ValueError(f"columns {', '.join(table.schema.names)}")
        return TokenDataset(table, counts, key)
    except Exception as error:  # a damaged file, or another program's
        raise UserError(
            f"data.cache: {folder}: damaged ({first_line(error)}); accepted: delete that folder"
        ) from error


def _entry(root: Path, key: str) -> Path:
    """Where an entry is, or goes: one that another user wrote and this one cannot read is none."""
    shared = root / key
    readable = all(os.access(shared / name, os.R_OK) for name in ("counts.json", "tokens.arrow"))
    return shared if readable or not os.path.lexists(shared) else root / f"{key}-{os.getuid()}"


def _tokenise(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task, path: Path
) -> Counts:
    import pyarrow as pa

    counts, schema = Counts(), _schema()
    rows = read_rows(source, split, options, limit)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            kept = list(_encode_chunk(source, chunk, options, task, counts))
            columns: dict[str, list] = {
                name: [getattr(example, name) for _, example in kept]
                for name in schema.names
                if name != "record"
            }
            columns["record"] = [record for record, _ in kept]
            writer.write_batch(pa.record_batch(columns, schema=schema))
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
) -> Iterator[tuple[int, Example]]:
    """(number among the used records, example) of a chunk of rows; records that cannot be used are
    counted or raise UserError."""
    rows: list[list[Record] | BadRecord] = []
    for _, row in chunk:
        try:
            if isinstance(row, BadRecord):
                raise row
            rows.append(to_records(row, detect_format(row, options, task), options, task.tokenizer))
        except BadRecord as reason:
            rows.append(reason)
    usable = [record for row in rows if isinstance(row, list) for record in row]
    encoded = iter(_encode(source, usable, options, task))
    for (line, _), found in zip(chunk, rows, strict=True):
        counts.records += 1
        examples: list[Example | str] = (
            [str(found)] if isinstance(found, BadRecord) else [next(encoded) for _ in found]
        )
        kept = [example for example in examples if isinstance(example, Example)]
        if not kept:
            if options.on_bad_record == "stop":
                raise _stop(source, line, examples[0])
            counts.bad += 1
            continue
        # A turn whose conversation fills max_length is left out, as it is from a single example.
        is_cut = any(example.truncated for example in kept)
        if len(kept) < len(examples) or is_cut:
            if options.on_long_record == "stop":
                raise UserError(
                    f"{source}:{line}: longer than data.max_length ({options.max_length} tokens); "
                    "accepted: shorter records, or data.on_long_record=truncate or drop"
                )
            if options.on_long_record == "drop":
                counts.dropped += 1
                continue
            counts.truncated += is_cut
            counts.turns_dropped += len(examples) - len(kept)
        for example in kept:
            yield counts.used, example
        counts.used += 1
        counts.examples += len(kept)
        counts.tokens += sum(len(example.input_ids) for example in kept)


def _encode(
    source: str, records: list[Record], options: DataOptions, task: Task
) -> list[Example | str]:
    """`task.encode`; a panic inside the tokenizer, which is no Exception, is a UserError."""
    try:
        return list(task.encode(records, options.max_length))
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(
            f"{source}: the tokenizer failed ({first_line(error)}); accepted: a tokenizer and "
            "records that it can encode"
        ) from error


def cache_root(options: DataOptions) -> Path:
    """Cache folder: tokenised data, matrix decompositions."""
    if options.cache is not None:
        return Path(options.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankcast"


def former_key(
    named: str, source: str, split: str, limit: int | None, options: DataOptions, task: Task
) -> str:
    """`TokenDataset.key` of the version before, into which a file's path went too: `named`, as the
    data was called then."""
    return _cache_key(source, split, limit, options, task, named)


def _cache_key(
    source: str,
    split: str,
    limit: int | None,
    options: DataOptions,
    task: Task,
    named: str | None = None,
) -> str:
    """Digest of everything that tokenisation depends on; options of batching are excluded. A file
    is its content, wherever it lies."""
    path = local(source)
    is_file = path is not None and path.is_file()
    content = _sha256(path) if path and is_file else f"{options.subset} {options.revision} {split}"
    named = named or (Path(source).suffix if is_file else source)
    batching = {
        "packing",
        "shuffle",
        "batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "micro_batches_multiple_of",
        "padding_free",
        "row_lengths",
        "cache",
        "train",
        "eval",
        "leave_out",
    }
    limits = {"train_records", "eval_records"}
    parts = [
        _VERSION,
        named,
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


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: a file that can be read") from error
