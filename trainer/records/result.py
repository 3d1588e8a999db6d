"""`Result`: what a run has left in its folder, as Python objects."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.yaml import parse_yaml
from trainer.files import ADAPTER, CHECKPOINTS, CONFIG, FIGURES, METRICS, MODEL, PREDICTIONS
from trainer.records.jsonl import decision_files, final_scores, read_metrics, read_objects


@dataclass(frozen=True)
class Result:
    """A run, read from its folder whenever a property is asked for.

    Tables are pandas data frames where pandas is installed, else lists of dictionaries.
    """

    folder: Path
    """The run folder."""

    @property
    def metrics(self) -> Any:
        """metrics.jsonl as a table: a row for every logged step and every evaluation."""
        return _table(read_metrics(self.folder / METRICS))

    @property
    def decisions(self) -> Any:
        """allocation.jsonl as a table, rotated parts included: a row for every decision."""
        return _table(line for file in decision_files(self.folder) for line in read_objects(file))

    @property
    def answers(self) -> Any:
        """predictions.jsonl as a table: a row for every record of the last evaluation, or of the
        best one; empty where the task has no answers."""
        return _table(read_objects(self.folder / PREDICTIONS))

    @property
    def step(self) -> int:
        """Optimizer steps made, as far as they were logged."""
        return max((line["step"] for line in read_metrics(self.folder / METRICS)), default=0)

    @property
    def scores(self) -> dict[str, float | None]:
        """Those of the last evaluation, or of the best one where the run keeps it; {} without any.
        None: not finite."""
        line = final_scores(read_metrics(self.folder / METRICS))
        return {name: value for name, value in line.items() if name.startswith("eval_")}

    @property
    def adapter(self) -> Path | None:
        """The exported adapter's folder, or the model's, of a run that trained all of it; None
        where nothing was exported."""
        found = [self.folder / name for name in (ADAPTER, MODEL)]
        return next((folder for folder in found if folder.is_dir()), None)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints' folders, the newest last."""
        return sorted((self.folder / CHECKPOINTS).glob("step-*"))

    @property
    def figures(self) -> list[Path]:
        """Drawn figures."""
        return sorted((self.folder / FIGURES).glob("*.png"))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        file = self.folder / CONFIG
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))

    def __str__(self) -> str:
        scores = [f"{name} {value:.4g}" for name, value in self.scores.items() if value is not None]
        return ", ".join([f"{self.folder}: {self.step} steps", *scores])


def _table(lines: Iterable[dict[str, Any]]) -> Any:
    rows = list(lines)
    if importlib.util.find_spec("pandas") is None:
        return rows
    import pandas

    return pandas.DataFrame(rows)
