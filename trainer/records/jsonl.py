"""The records of a run folder, one JSON object a line; reading them needs no torch and no model.

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
    """The objects of a .jsonl one by one, for files larger than memory; none where it is absent.

    A last line cut short by a crash is left out; anything else that is no object with a `step`
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
                        "accepted: what a run wrote"
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
    """Drop the other lines: a killed run logged more than what it resumes from."""
    kept = [line for line in read_objects(file) if wanted(line)]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))


def decision_files(folder: Path) -> list[Path]:
    """The files of a run's decisions, oldest first: closed parts, then the one being written."""
    current = folder / DECISIONS
    return [*sorted(folder.glob(DECISION_PARTS)), *([current] if current.exists() else [])]


def open_decisions(file: Path) -> IO[str]:
    """A file of decisions as text, compressed or not."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")
