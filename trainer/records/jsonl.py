"""JSONL records of a run folder, one object per line; imports no torch.

metrics.jsonl        a logged step or an evaluation
allocation.jsonl     a decision; older ones in allocation-<first step>-<last step>.jsonl.gz
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.files import DECISION_PARTS, DECISIONS, write_text


def read_objects(file: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a .jsonl without loading it; none where the file is missing.

    A last line truncated by a crash is skipped; any other line that is not an object with a `step`
    raises UserError.
    """
    if not file.exists():
        return
    try:
        with open_decisions(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    value = parse_json(line)
                except ValueError:
                    if next(lines, None) is None:
                        return
                    value = None
                if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                    raise UserError(
                        f"{file} line {number}: no JSON object with a step; "
                        "accepted: a file that a run wrote"
                    )
                yield value
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; accepted: a file to read") from error
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not readable; accepted: a file that a run wrote") from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All objects of a metrics.jsonl; [] where there is none."""
    return list(read_objects(file))


def keep_lines(file: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines that are not `wanted`: a killed run logged steps after its last checkpoint."""
    kept = [line for line in read_objects(file) if wanted(line)]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))


def decision_files(folder: Path) -> list[Path]:
    """Decision files of a run, oldest first: rotated parts, then the current file."""
    current = folder / DECISIONS
    return [*sorted(folder.glob(DECISION_PARTS)), *([current] if current.exists() else [])]


def open_decisions(file: Path) -> IO[str]:
    """Open a decision file as text, compressed or not."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")
