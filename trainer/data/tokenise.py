"""Tokenises the records of a source into the cache, or finds them there."""

import itertools
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.data_options import DataOptions, SourceNames
from trainer.config.sections import Shown
from trainer.data.cache import cache_key, cache_root, entry, is_whole, lock
from trainer.data.dataset import TokenDataset, open_dataset
from trainer.data.display import Display, say
from trainer.data.encode import Encoder, stop
from trainer.data.extent import Extent
from trainer.data.formats import raw_label, to_records
from trainer.data.parts import Parts
from trainer.data.sources import Row, name_of, read_rows
from trainer.data.workers import Workers
from trainer.errors import EXIT_USAGE, BadRecord, UserError, reason
from trainer.files import take_place
from trainer.tasks.base import Task

_RECORDS, _CHARACTERS = 1000, 2**20
"""Of a chunk, which is tokenised in one call, at most; but one record is."""
_LOOK = 0.2  # seconds between two looks whether to stop

Chunk = list[tuple[str, Row]]


def read_labels(
    source: SourceNames, split: str, options: DataOptions, kind: str = "classification"
) -> list[str | float]:
    """The raw labels of a source of format `kind`. Bad records raise UserError or are skipped; of
    images, which would be read twice, the labels alone are looked at."""
    labels: list[str | float] = []
    for place, row in read_rows(source, split, options, options.train_records):
        try:
            if isinstance(row, BadRecord):
                raise row
            if kind == "images":
                labels.append(raw_label(row, options))
                continue
            (record,) = to_records(row, kind, options, None)
        except BadRecord as reason:
            if options.on_bad_record == "stop":
                raise stop(place, reason) from reason
            continue
        assert record.label is not None
        labels.append(record.label)
    if not labels:
        raise UserError(f"{name_of(source)}: no usable record; accepted: at least one")
    return labels


def prepare(
    source: SourceNames, split: str, limit: int | None, options: DataOptions, task: Task,
    shown: Shown = "none", check: Callable[[], None] = lambda: None,
) -> TokenDataset:  # fmt: skip
    """Tokenise `source`, or read it from the cache. Where another process tokenises the same, its
    result is waited for. Raises UserError.

    `check` is called now and then, and raises where the work is to stop; what is done by then, a
    next start goes on with.
    """
    key = cache_key(source, split, limit, options, task)
    folder = entry(cache_root(options), key)
    try:
        if not is_whole(folder):
            with lock(folder, check, partial(say, shown)) as unfinished:
                if not is_whole(folder):
                    work = Encoder(source, options, task)
                    _tokenise(work, split, limit, unfinished, shown, check)
                    take_place(unfinished, folder)  # of a damaged one, if there is any
    except OSError as error:
        raise UserError(
            f"data.cache: {folder.parent}: cannot be written ({reason(error)}); accepted: a folder "
            "to write into"
        ) from error
    return open_dataset(folder, key)


def _tokenise(
    work: Encoder, split: str, limit: int | None, folder: Path, shown: Shown,
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Fill `folder` with an entry of the cache. Nothing is left of it where records or the disk do
    not allow that; all that is done where `check` or a signal stops it."""
    try:
        with closing(Parts(folder)) as parts:
            _fill(parts, work, split, limit, shown, check)
            if parts.counts.used == 0:
                raise UserError(
                    f"{name_of(work.source)}: no usable record ({parts.counts}); accepted: at "
                    "least one; data.on_bad_record=stop, data.on_long_record=stop say what is wrong"
                )
            parts.finish()
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) or error.exit_code == EXIT_USAGE:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(
    parts: Parts, work: Encoder, split: str, limit: int | None, shown: Shown,
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Tokenise what is missing."""
    extent, options, kept = Extent(), work.options, parts.counts.records
    rows = read_rows(work.source, split, options, limit, extent)
    with (
        Display(name_of(work.source), shown, kept) as display,
        Workers(work, options.workers, look := _at_times(check, display.refresh)) as workers,
    ):
        for _ in itertools.islice(rows, kept):
            look()
        display.begin(extent.share)
        shares: deque[float | None] = deque()  # of the source, at the end of each chunk
        for batch, counts in workers.map(_chunks(rows, lambda: shares.append(extent.share))):
            parts.append(batch, counts)
            done = parts.counts.records
            share = shares.popleft() if limit is None else done / limit
            display.show(done, share, workers.number)


def _chunks(rows: Iterator[tuple[str, Row]], is_read: Callable[[], None]) -> Iterator[Chunk]:
    """The rows, in chunks that depend on nothing else; `is_read` is called after each."""
    chunk: Chunk = []
    size = 0
    for place, row in rows:
        chunk.append((place, row))
        size += _characters(row)
        if len(chunk) == _RECORDS or size >= _CHARACTERS:
            is_read()
            yield chunk
            chunk, size = [], 0
    if chunk:
        is_read()
        yield chunk


def _characters(value: Any) -> int:
    """Of all texts in a row, about; of images, bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Path):
        return value.stat().st_size if value.is_file() else 0
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(_characters, value))


def _at_times(*actions: Callable[[], None]) -> Callable[[], None]:
    """A function that may be called often, and does that seldom."""
    due = time.monotonic() + _LOOK

    def look() -> None:
        nonlocal due
        if time.monotonic() >= due:
            for action in actions:
                action()
            due = time.monotonic() + _LOOK

    return look
