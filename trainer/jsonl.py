"""The records of a run folder, one JSON object a line; reading them needs no torch and no model.

metrics.jsonl        a logged step or an evaluation
allocation.jsonl     a decision; older ones in allocation-<first step>-<last step>.jsonl.gz
"""

import gzip
import json
from pathlib import Path
from typing import IO, Any

from trainer.errors import UserError
from trainer.strict import parse_json

METRICS = "metrics.jsonl"
DECISIONS = "allocation.jsonl"
PARTS = "allocation-*.jsonl.gz"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a line cut short by a crash is left out."""
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; accepted: a file that a run wrote") from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = parse_json(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            raise UserError(f"{file} line {number}: no JSON object; accepted: what a run wrote")
        lines.append(value)
    return lines


def cut_after(file: Path, step: int, first: int = 0) -> None:
    """Keep the lines of steps `first` to `step`: a killed run logged more than it resumes from."""
    lines = read_metrics(file)
    strange = [line for line in lines if not isinstance(line.get("step"), int)]
    if strange:
        raise UserError(f"{file}: {strange[0]} has no step; accepted: what a run wrote")
    kept = [line for line in lines if first <= line["step"] <= step]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(file)


def decision_files(folder: Path) -> list[Path]:
    """The files of a run's decisions, oldest first: closed parts, then the one being written."""
    current = folder / DECISIONS
    return [*sorted(folder.glob(PARTS)), *([current] if current.exists() else [])]


def open_decisions(file: Path) -> IO[str]:
    """A file of decisions as text, compressed or not."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")
