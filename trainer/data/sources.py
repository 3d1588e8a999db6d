"""What a source's name stands for, and its rows.

A source is a file, a glob of files, a folder of files of one kind, a folder that
`datasets.save_to_disk` wrote, or a data set of the hub, which is streamed; or a list of those, one
after the other.
"""

import glob
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.data_options import SourceNames, SourceOptions
from trainer.config.validation import local
from trainer.data.extent import Extent
from trainer.data.images import folder_rows, image_files
from trainer.data.readers import FILES, Row, ending, read_file, without_nulls
from trainer.errors import UserError, first_line, reason
from trainer.files import sha256

SPLITS = {"train", "dev", "val", "valid", "validation", "test"}
"""What folders in a folder of images are called that hold no class, but a split; and how the names
of files begin that hold one."""
_WORD = re.compile(r"[a-z]*")


def read_rows(
    source: SourceNames, split: str, options: SourceOptions, limit: int | None,
    extent: Extent | None = None,
) -> Iterator[tuple[str, Row]]:  # fmt: skip
    """(place, row or BadRecord) of a source; the place is `FILE:LINE`, or the number of the record
    in its file or data set, from 1. `extent`: told how much was read."""
    return itertools.islice(_all_rows(source, split, options, extent or Extent()), limit)


def _all_rows(
    source: SourceNames, split: str, options: SourceOptions, extent: Extent
) -> Iterator[tuple[str, Row]]:
    parts = list(_parts(source, split))
    sizes = [_size(part) for part in parts]
    if len(parts) == 1 or all(sizes):  # else it is not known how much there is
        extent.expect(sum(sizes) or 1)
    before = 0
    for part, size in zip(parts, sizes, strict=True):
        own, is_empty = Extent(), True
        for number, row in _rows_of(part, split, options, own):
            is_empty = False
            extent.done = before + (size or 1) * (own.share or 0)
            yield f"{part}:{number}", row
        if is_empty:
            raise UserError(f"{part}: no records; accepted: at least one")
        before += size


def _rows_of(
    part: Path | str, split: str, options: SourceOptions, extent: Extent
) -> Iterator[tuple[int, Row]]:
    if isinstance(part, str):
        return enumerate(_hub_rows(part, split, options, extent), 1)
    if part.is_dir():
        if not (part / "state.json").is_file():
            files = len(image_files(part))
            return enumerate(extent.counted(folder_rows(part), files), 1)
        return enumerate(_saved_rows(part, extent), 1)
    return read_file(part, options, extent)


def _size(part: Path | str) -> int:
    """Bytes on disk; 0: not known."""
    if isinstance(part, str):
        return 0
    files = part.iterdir() if part.is_dir() else [part]
    return sum(file.stat().st_size for file in files)


def name_of(source: SourceNames) -> str:
    """A source in messages."""
    return source if isinstance(source, str) else ", ".join(source)


def hub_ids(source: SourceNames) -> list[str]:
    """The data sets of the hub among a source's names."""
    return [name for name in names_in(source) if _is_hub_id(name)]


def origins(source: SourceNames, split: str, options: SourceOptions) -> list[tuple[str, str]]:
    """What the records of a source depend on: (suffix, digest) of each file, wherever it lies;
    (name, subset, revision and split) of a data set of the hub."""
    found = []
    for part in _parts(source, split):
        if isinstance(part, str):
            found.append((part, f"{options.subset} {options.revision} {split}"))
        elif part.is_dir():
            files = sorted(path for path in part.iterdir() if path.is_file())
            found += [(path.name, _sha256(path)) for path in files]
            if not (part / "state.json").is_file():
                images = image_files(part)
                found += [(str(path.relative_to(part)), _sha256(path)) for path in images]
        else:
            found.append((ending(part), _sha256(part)))
    return found


def located(source: SourceNames, split: str, options: SourceOptions) -> list[str]:
    """Where the records of a source are, in words that are equal for the same place only."""
    return [
        f"{part} ({options.subset}, {split})" if isinstance(part, str) else str(part.resolve())
        for part in _parts(source, split)
    ]


def _parts(source: SourceNames, split: str) -> Iterator[Path | str]:
    """The files, folders of `save_to_disk` and hub ids of a source, in order. Raises UserError."""
    for name in names_in(source):
        path = local(name)
        if path is not None and path.is_dir():
            yield from _in_folder(path, split)
        elif path is not None:
            if not path.is_file():  # reading a pipe would wait for its other end
                raise UserError(f"{name}: not a data file; accepted: {FILES}")
            yield path
        elif _is_glob(name):
            # Unlike Path.glob, this leaves hidden files out.
            found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
            files = [Path(match) for match in found if Path(match).is_file()]
            if not files:
                raise UserError(f"{name}: no file matches; accepted: a glob of data files")
            yield from files
        elif _is_hub_id(name):
            yield name
        else:
            raise UserError(
                f"{name}: no such file; accepted: a file ({FILES}), a glob or folder of them, or a "
                "hub id"
            )


def names_in(source: SourceNames) -> list[str]:
    return [source] if isinstance(source, str) else source


def _is_glob(name: str) -> bool:
    return glob.has_magic(name)


def _is_hub_id(name: str) -> bool:
    is_path = name.startswith((".", "/")) or bool(ending(Path(name)))
    return local(name) is None and not is_path and not _is_glob(name) and name.count("/") == 1


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, or the folder of a split that `save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        return [_split_of(folder, split)]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [folder]
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(
            f"{folder}: {reason(error)}; accepted: a folder that can be read"
        ) from error
    files = _of_split(folder, [path for path in inside if path.is_file() and ending(path)], split)
    named = [path.name for path in inside if path.is_dir()]
    if not files and named and split not in named and SPLITS.issuperset(named):
        raise UserError(f"{folder}: no split {split!r}; accepted: {', '.join(named)}")
    for images in (folder / split, folder) if not files else ():
        if images.is_dir() and image_files(images):
            return [images]
    kinds = sorted({ending(path) for path in files})
    if not files:
        raise UserError(
            f"{folder}: no data file in this folder; accepted: {FILES}, images in subfolders named "
            f"after their classes, or a glob such as {folder}/**/*.parquet"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: files of several kinds ({', '.join(kinds)}); accepted: one kind, or a glob "
            f"such as {folder}/*{kinds[0]}"
        )
    return files


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Those of a split, where files are named after several (train-00000-of-00002.parquet,
    test.jsonl); else all."""
    of = {path: _WORD.match(path.name.lower())[0] for path in files}  # type: ignore[index]
    named = SPLITS.intersection(of.values())
    if len(named) < 2:
        return files
    if split not in named or not SPLITS.issuperset(of.values()):
        others = sorted(path.name for path in files if of[path] not in SPLITS)
        beside = f" and the files {', '.join(others)}" if others else ""
        raise UserError(
            f"{folder}: files of the splits {', '.join(sorted(named))}{beside} for the split "
            f"{split}; accepted: one of these splits, with no other files, or a glob such as "
            f"{folder}/{sorted(named)[0]}*"
        )
    return [path for path in files if of[path] == split]


def _split_of(folder: Path, split: str) -> Path:
    """The folder of a split that a DatasetDict was saved to."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/dataset_dict.json: no list of splits ({reason(error)})"
        ) from error
    if split not in splits or not (folder / split).is_dir():
        raise UserError(f"{folder}: no split {split!r}; accepted: {', '.join(map(str, splits))}")
    return folder / split


def _saved_rows(folder: Path, extent: Extent) -> Iterator[dict]:
    """The rows of a data set that `save_to_disk` wrote, memory-mapped."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
        yield from extent.counted(map(without_nulls, _encoded(rows)), len(rows))
    except Exception as error:  # of `datasets`, and of Arrow
        raise UserError(f"{folder}: no data set of save_to_disk ({first_line(error)})") from error


def _hub_rows(source: str, split: str, options: SourceOptions, extent: Extent) -> Iterator[dict]:
    """The rows of a data set of the hub, as they come: it is never held whole."""
    import datasets

    try:
        rows = datasets.load_dataset(
            source, options.subset, split=split, revision=options.revision, streaming=True
        )
        splits = rows.info.splits or {}
        number = splits[split].num_examples if split in splits else 0  # 0: not known
        yield from extent.counted(map(without_nulls, _encoded(rows)), number)
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"{source}: neither a local file nor a data set that the hub gives "
            f"({first_line(error)})"
        ) from error


def _encoded(rows: Any) -> Any:
    """A data set whose images are left as they are encoded."""
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: a file that can be read") from error
