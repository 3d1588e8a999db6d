"""Results to be kept with the sources: small, and readable by later versions of the code.

A line has what its comparison's score needs of the records, and names its run by arm, learning rate
and seed instead of a digest of the configuration, which changes with the configuration's keys, and
has a digest of what the comparison's file said of the arm.
"""

import hashlib
import json
import lzma
from collections.abc import Mapping
from pathlib import Path

from trainer.comparison.jobs import Job, Jobs, Result
from trainer.comparison.schedule import Schedule
from trainer.config.yaml import parse_json
from trainer.files import replacing

KEPT = "results.jsonl.xz"

_COLUMNS = {
    "eval_loss": ("id", "loss", "weight"),
    "eval_accuracy": ("id", "score"),
    "eval_f1": ("id", "answer", "label"),
    "eval_matthews": ("id", "answer", "label"),
    "eval_pearson": ("id", "answer", "label"),
}
"""What each score needs of the records."""


def write_kept(schedule: Schedule, folder: Path) -> None:
    """Write the results of a comparison's runs to `folder`, in place of those of the same runs that
    are there; others stay. Nothing is written where there are none."""
    if not schedule.results:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = {_key(line): line for line in _lines(folder)}
    lines |= {_key(line): line for line in (_brief(schedule, r) for r in schedule.results)}
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    with replacing(folder / KEPT) as temporary:
        temporary.write_bytes(lzma.compress(text.encode(), preset=9))


def read_kept(jobs: Jobs, folder: Path) -> list[Result]:
    """The results kept in `folder`, by today's digests; those of arms that are no more, or of which
    the file says something else now, are left out."""
    found = []
    for line in _lines(folder):
        if jobs.knows(line["method"]) and line["said"] == _said(jobs, line["method"]):
            job = Job(line["method"], line["learning_rate"], line["seed"], line["selects"])
            found.append(line | {"config": jobs.digest(job)})
    return found


def _lines(folder: Path) -> list[Result]:
    file = folder / KEPT
    if not file.exists():
        return []
    return [parse_json(one) for one in lzma.decompress(file.read_bytes()).decode().splitlines()]


def _key(line: Result) -> tuple[object, ...]:
    return tuple(line[name] for name in ("method", "learning_rate", "seed", "selects", "said"))


def _said(jobs: Jobs, method: str) -> str:
    """Digest of what the comparison says of an arm, without the places of models and data."""
    comparison = jobs.comparison
    said: list[object] = [
        comparison.base, comparison.overrides, comparison.selection, jobs.of_method(method)
    ]  # fmt: skip
    arm = comparison.methods.get(method)
    if arm is not None and arm.replays is not None and arm.permuted == "any":
        # Results of other arms that replay were kept without it, before there was `any`.
        said.append([arm.permuted, arm.replays, _said(jobs, arm.replays)])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def _brief(schedule: Schedule, result: Result) -> Result:
    said = _said(schedule.jobs, result["method"])
    kept = {"said": said} | {
        k: v for k, v in result.items() if k not in ("config", "records", "run", "where")
    }
    records: Mapping[str, object] | None = result.get("records")
    if records is not None:
        names = _COLUMNS[schedule.jobs.comparison.score]
        kept["records"] = {name: records[name] for name in names if name in records}
    return {k: float(f"{v:.6g}") if isinstance(v, float) and k != "learning_rate" else v
            for k, v in kept.items()}  # fmt: skip
