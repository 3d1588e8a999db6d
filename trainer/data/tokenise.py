"""Tokenises the records of a source into the cache, or finds them there.

Records that cannot be used are reported with file, line and reason.
"""

import dataclasses
import itertools
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.config.yaml import parse_json
from trainer.data.cache import cache_key, cache_root, entry
from trainer.data.dataset import Counts, TokenDataset, schema
from trainer.data.records import detect_format, to_records
from trainer.data.sources import Row, read_rows
from trainer.errors import BadRecord, UserError, first_line, reason
from trainer.tasks.base import Example, Record, Task

_CHUNK = 1000  # records tokenised in one call


def read_labels(source: str, split: str, options: DataOptions) -> list[str | float]:
    """The raw labels of a classification source. Bad records raise UserError or are skipped."""
    labels = []
    for place, row in read_rows(source, split, options, options.train_records):
        try:
            if isinstance(row, BadRecord):
                raise row
            (record,) = to_records(row, "classification", options, None)
        except BadRecord as reason:
            if options.on_bad_record == "stop":
                raise _stop(place, reason) from reason
            continue
        assert record.label is not None
        labels.append(record.label)
    if not labels:
        raise UserError(f"{source}: no usable record; accepted: at least one")
    return labels


def _stop(place: str, reason: object) -> UserError:
    return UserError(f"{place}: {reason} (data.on_bad_record=skip leaves such records out)")


def prepare(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task
) -> TokenDataset:
    """Tokenise `source`, or read it from the cache. Call it on one rank of each node first. Raises
    UserError."""
    key = cache_key(source, split, limit, options, task)
    folder = entry(cache_root(options), key)
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
        if table.schema != schema():
            raise ValueError(f"columns {', '.join(table.schema.names)}")
        return TokenDataset(table, counts, key)
    except Exception as error:  # a damaged file, or another program's
        raise UserError(
            f"data.cache: {folder}: damaged ({first_line(error)}); accepted: delete that folder"
        ) from error


def _tokenise(
    source: str, split: str, limit: int | None, options: DataOptions, task: Task, path: Path
) -> Counts:
    import pyarrow as pa

    counts, columns = Counts(), schema()
    rows = read_rows(source, split, options, limit)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            kept = list(_encode_chunk(source, chunk, options, task, counts))
            values: dict[str, list] = {
                name: [getattr(example, name) for _, example in kept]
                for name in columns.names
                if name != "record"
            }
            values["record"] = [record for record, _ in kept]
            writer.write_batch(pa.record_batch(values, schema=columns))
    if counts.records == 0:
        raise UserError(f"{source}: no records; accepted: at least one")
    if counts.used == 0:
        raise UserError(f"{source}: no usable record ({counts})")
    return counts


def _encode_chunk(
    source: str,
    chunk: list[tuple[str, Row]],
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
    for (place, _), found in zip(chunk, rows, strict=True):
        counts.records += 1
        examples: list[Example | str] = (
            [str(found)] if isinstance(found, BadRecord) else [next(encoded) for _ in found]
        )
        kept = [example for example in examples if isinstance(example, Example)]
        if not kept:
            if options.on_bad_record == "stop":
                raise _stop(place, examples[0])
            counts.bad += 1
            continue
        # A turn whose conversation fills max_length is left out, as it is from a single example.
        is_cut = any(example.truncated for example in kept)
        if len(kept) < len(examples) or is_cut:
            if options.on_long_record == "stop":
                raise UserError(
                    f"{place}: longer than data.max_length ({options.max_length} tokens); "
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
