"""Results to be kept with the sources: small, and readable by later versions of the code.

A line has what its comparison's score needs of the records, and names its run by arm, learning rate
and seed instead of a digest of the configuration, which changes with the configuration's keys.
"""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path

from trainer.comparison.jobs import Job, Jobs, Result
from trainer.comparison.schedule import Schedule
from trainer.config.yaml import parse_json

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
    """Write the results of a comparison's runs to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_brief(schedule, result)) + "\n" for result in schedule.results]
    (folder / KEPT).write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def read_kept(jobs: Jobs, folder: Path) -> list[Result]:
    """The results kept in `folder`, by today's digests; those of arms that are no more are left
    out."""
    file = folder / KEPT
    if not file.exists():
        return []
    lines = lzma.decompress(file.read_bytes()).decode().splitlines()
    found = []
    for line in map(parse_json, lines):
        if jobs.knows(line["method"]):
            job = Job(line["method"], line["learning_rate"], line["seed"], line["selects"])
            found.append(line | {"config": jobs.digest(job)})
    return found


def _brief(schedule: Schedule, result: Result) -> Result:
    kept = {k: v for k, v in result.items() if k not in ("config", "records", "run", "where")}
    records: Mapping[str, object] | None = result.get("records")
    if records is not None:
        names = _COLUMNS[schedule.jobs.comparison.score]
        kept["records"] = {name: records[name] for name in names if name in records}
    return {k: float(f"{v:.6g}") if isinstance(v, float) and k != "learning_rate" else v
            for k, v in kept.items()}  # fmt: skip
