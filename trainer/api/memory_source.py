"""Records in memory as a source: written once to the cache, under a name that is their content, so
that the run resumes on the same records, and can be evaluated later."""

import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError, first_line, reason
from trainer.files import replacing

_ACCEPTED = (
    "a datasets.Dataset, a pandas.DataFrame, a list of dictionaries, a path or a list of paths"
)


def sources_of(given: Any, key: str, folder: Path) -> Any:
    """What `data.train` or `data.eval` (`key`) are to be: paths in `folder` in place of records in
    memory, also in a dictionary of named sets; names and numbers as they are. Raises UserError."""
    if key == "eval" and isinstance(given, Mapping):
        return {name: sources_of(one, f"eval.{name}", folder) for name, one in given.items()}
    if isinstance(given, Path):
        return str(given)
    if isinstance(given, str) or (key == "eval" and isinstance(given, int | float)):
        return given
    if isinstance(given, list) and given and all(isinstance(one, str | Path) for one in given):
        return [str(one) for one in given]
    content, suffix = _content(given, key)
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(file, shared=True) as partial:
                partial.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"data.cache: {folder}: cannot be written ({reason(error)}); accepted: a folder to "
            "write into"
        ) from error
    return str(file)


def _content(given: Any, key: str) -> tuple[bytes, str]:
    """(bytes, suffix) of a file that holds the records. Raises UserError."""
    if isinstance(given, list):
        return _json_lines(given, key), ".jsonl"
    if _is_a(given, "pandas", "DataFrame") or _is_a(given, "datasets", "Dataset"):
        if not len(given):
            raise UserError(f"{key}: no records; accepted: at least one")
        return _parquet(given, key), ".parquet"
    hint = ""
    if _is_a(given, "datasets", "DatasetDict"):
        hint = f" (one of its splits: {', '.join(map(str, given))})"
    raise UserError(f"{key}: {type(given).__name__} given; accepted: {_ACCEPTED}{hint}")


def _is_a(value: Any, library: str, name: str) -> bool:
    """Whether it is an instance of a library's class, of which only an imported one has any."""
    kind = getattr(sys.modules.get(library), name, None)
    return kind is not None and isinstance(value, kind)


def _json_lines(records: list, key: str) -> bytes:
    if not records:
        raise UserError(f"{key}: no records; accepted: at least one")
    lines = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise UserError(
                f"{key}: record {number} is a {type(record).__name__}; accepted: {_ACCEPTED}"
            )
        try:
            lines.append(json.dumps(dict(record), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{key}: record {number}: {first_line(error)}; accepted: texts, numbers, lists and "
                "dictionaries of them (images: a datasets.Dataset)"
            ) from error
    return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogatepass")


def _parquet(given: Any, key: str) -> bytes:
    import datasets

    buffer = io.BytesIO()
    try:
        if not isinstance(given, datasets.Dataset):
            given = datasets.Dataset.from_pandas(given, preserve_index=False)
        given.to_parquet(buffer)
    except Exception as error:  # Arrow's types, for columns of mixed values
        raise UserError(
            f"{key}: {first_line(error)}; accepted: columns of one type each, or a list of "
            "dictionaries"
        ) from error
    return buffer.getvalue()
