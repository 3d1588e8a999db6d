"""Tokenises the records of a source into the cache, or finds them there.

Records that cannot be used are reported with file, line and reason.
"""

import dataclasses
import itertools
import json
import secrets
import shutil
from pathlib import Path

from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.config.yaml import parse_json
from trainer.data.cache import cache_key, cache_root, entry
from trainer.data.dataset import Counts, TokenDataset, schema
from trainer.data.encode import Encoder, stop
from trainer.data.records import to_records
from trainer.data.sources import read_rows
from trainer.errors import BadRecord, UserError, first_line, reason
from trainer.tasks.base import Task

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
                raise stop(place, reason) from reason
            continue
        assert record.label is not None
        labels.append(record.label)
    if not labels:
        raise UserError(f"{source}: no usable record; accepted: at least one")
    return labels


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
    import pyarrow.compute as pc

    counts, encode, columns = Counts(), Encoder(source, options, task), schema()
    rows = read_rows(source, split, options, limit)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            batch, more = encode(chunk)
            at = columns.get_field_index("record")
            numbers = pc.add(batch.column(at), pa.scalar(counts.used, pa.int32()))
            writer.write_batch(batch.set_column(at, columns.field(at), numbers))
            counts.add(more)
    if counts.records == 0:
        raise UserError(f"{source}: no records; accepted: at least one")
    if counts.used == 0:
        raise UserError(f"{source}: no usable record ({counts})")
    return counts
