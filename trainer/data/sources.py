"""What a source's name stands for, and its rows: a file, or a data set of the hub."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.config.data_options import SourceOptions
from trainer.config.validation import local
from trainer.data.extent import Extent
from trainer.data.readers import SUFFIXES, Row, read_file, without_nulls
from trainer.errors import UserError, first_line


def read_rows(
    source: str, split: str, options: SourceOptions, limit: int | None, extent: Extent | None = None
) -> Iterator[tuple[str, Row]]:
    """(place, row or BadRecord) of a file or a hub data set; the place is `NAME:LINE`, or the
    number of the record, from 1. `extent`: told how much was read."""
    return itertools.islice(_all_rows(source, split, options, extent or Extent()), limit)


def _all_rows(
    source: str, split: str, options: SourceOptions, extent: Extent
) -> Iterator[tuple[str, Row]]:
    path = local(source)
    if path is not None:
        yield from ((f"{path}:{line}", row) for line, row in read_file(path, options, extent))
        return
    is_path = Path(source).suffix.lower() in SUFFIXES or source.startswith((".", "/"))
    if is_path or source.count("/") != 1:
        raise UserError(
            f"{source}: no such file; accepted: a {', '.join(SUFFIXES)} file or a hub id"
        )
    rows = _hub_rows(source, split, options, extent)
    yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))


def _hub_rows(source: str, split: str, options: SourceOptions, extent: Extent) -> Iterable[dict]:
    import datasets

    try:
        rows = datasets.load_dataset(source, options.subset, split=split, revision=options.revision)
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"{source}: neither a local file nor a data set that the hub gives "
            f"({first_line(error)})"
        ) from error
    return extent.counted(map(without_nulls, rows), len(rows))
