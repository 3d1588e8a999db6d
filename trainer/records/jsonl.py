"""JSONL records of a run folder, one object per line; imports no torch.

metrics.jsonl        a logged step or an evaluation
allocation.jsonl     a decision; older ones in allocation-<first step>-<last step>.jsonl.gz
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.config.yaml import parse_json
from trainer.errors import UserError, reason
from trainer.files import DECISION_PARTS, DECISIONS, replacing, write_text


def read_objects(
    file: Path, on_tail: Callable[[int], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a .jsonl without loading it; none where the file is missing.

    What a crash left at the end is skipped: `on_tail` is called with its number of bytes. Any other
    line that is not an object with a `step` raises UserError.
    """
    if not file.exists():
        return
    if not file.is_file():  # a named pipe that nobody writes to would be waited for
        raise UserError(f"{file}: no regular file; accepted: a file that a run wrote")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                value = _record(line)
                if value is not None:
                    yield value
                    continue
                rest = [line, *lines]
                foreign = number == 1 and (len(rest) > 1 or _is_json(line))
                if foreign or any(map(_record, rest)):
                    raise UserError(
                        f"{file} line {number}: no JSON object with a step; "
                        "accepted: a file that a run wrote"
                    )
                if on_tail is not None:
                    on_tail(sum(map(len, rest)))
                return
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}; accepted: a file to read") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file}: not readable; accepted: a file that a run wrote") from error


def _is_json(line: bytes) -> bool:
    with suppress(ValueError):
        parse_json(line.decode("utf-8"))
        return True
    return False


def _record(line: bytes) -> dict[str, Any] | None:
    """The object of a line, if it is one with a step."""
    try:
        value = parse_json(line.decode("utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All objects of a metrics.jsonl; [] where there is none."""
    return list(read_objects(file))


def final_scores(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The line of the last evaluation, or of the best one where a run keeps it: of what a run
    exports. {} without any."""
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        return {}
    step = evaluated[-1].get("best_step", evaluated[-1]["step"])
    return next((line for line in reversed(evaluated) if line["step"] == step), evaluated[-1])


def write_objects(file: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by lines of objects; numbers that are not finite become null."""
    with replacing(file) as partial, partial.open("w", encoding="utf-8") as lines:
        for one in objects:
            lines.write(json.dumps(_plain(one), ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines(file: Path, wanted: Callable[[dict[str, Any]], bool]) -> str:
    """Drop lines that are not `wanted`: a killed run logged steps after its last checkpoint.
    Returns a remark on what was at the end and is no record, "" where nothing was."""
    tail: list[int] = []
    kept = [line for line in read_objects(file, tail.append) if wanted(line)]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
    return f"{file}: {tail[0]} bytes at its end were no record" if tail else ""


def decision_files(folder: Path) -> list[Path]:
    """Decision files of a run, oldest first: rotated parts, then the current file."""
    current = folder / DECISIONS
    return [*sorted(folder.glob(DECISION_PARTS)), *([current] if current.exists() else [])]


def open_decisions(file: Path) -> IO[str]:
    """Open a decision file as text, compressed or not."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")
