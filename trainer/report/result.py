"""`Result`: what a run has left in its folder, as Python objects. docs/python.md has the list."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.banks import LOCATIONS
from trainer.config.yaml import parse_yaml
from trainer.files import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    FIGURES,
    LOSSES,
    METRICS,
    MODEL,
    PREDICTIONS,
    README,
    REPORT,
    UNITS,
)
from trainer.records.heartbeat import read_heartbeat
from trainer.records.jsonl import decision_files, final_scores, read_metrics, read_objects
from trainer.report.allocation_history import Allocation, Unit, read_allocation, read_units


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
    def training(self) -> Any:
        """Of `metrics`, the logged steps."""
        return _table(line for line in read_metrics(self.folder / METRICS) if not _is_eval(line))

    @property
    def evaluations(self) -> Any:
        """Of `metrics`, the evaluations."""
        return _table(line for line in read_metrics(self.folder / METRICS) if _is_eval(line))

    @property
    def decisions(self) -> Any:
        """allocation.jsonl as a table, rotated parts included: a row for every decision."""
        return _table(line for file in decision_files(self.folder) for line in read_objects(file))

    @property
    def units(self) -> Any:
        """units.json as a table: a row for every adapted matrix; empty where there is none."""
        return _table(vars(unit) for unit in self._units())

    @property
    def ranks(self) -> Any:
        """A row for every adapted matrix and every decision about ranks: `step`, the first one
        (from 0) that it holds for, `unit`, `layer`, `kind`, `rank` and, where the method chooses
        it, `location`. Of a method that decides nothing, its rank from step 0 on. Empty where there
        are no adapters, or where a start from the data gave the ranks (`redistributed`), of which
        the run keeps no table: `rank_pattern` in the adapter's adapter_config.json has them."""
        method = self.config["method"]
        kept = method.get("rank")
        given = (method.get("start_options") or {}).get("ranks") == "redistributed"
        units = self._units() if kept is not None else []
        if not units:
            return _table(())
        allocation = read_allocation(self.folder, kept, self.step)
        if allocation is None or not allocation.ranks.steps:
            return _table(() if given else (_row(unit, 0, kept) for unit in units))
        return _table(_ranks(allocation))

    @property
    def answers(self) -> Any:
        """predictions.jsonl as a table: a row for every record of the last evaluation, or of the
        best one; empty where the task has no answers."""
        return _table(read_objects(self.folder / PREDICTIONS))

    @property
    def losses(self) -> Any:
        """losses.jsonl as a table: the loss of every record of that evaluation; empty without
        `log.record_losses`."""
        return _table(read_objects(self.folder / LOSSES))

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
    def best_checkpoint(self) -> Path | None:
        """The folder of the best evaluation's checkpoint; None without `run.keep_best`."""
        step = final_scores(read_metrics(self.folder / METRICS)).get("best_step")
        found = None if step is None else self.folder / CHECKPOINTS / f"step-{step:08d}"
        return found if found is not None and found.is_dir() else None

    @property
    def figures(self) -> list[Path]:
        """Drawn figures."""
        return sorted((self.folder / FIGURES).glob("*.png"))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        file = self.folder / CONFIG
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))

    @property
    def status(self) -> dict[str, Any]:
        """heartbeat.json: `state`, `start_seconds` (of each phase of the last start), host, …"""
        return read_heartbeat(self.folder)

    @property
    def readme(self) -> str:
        """README.md: the result in a line, what the files are, the figures' names, samples; ""
        before the end of the run."""
        file = self.folder / README
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def report(self, file: str | Path | None = None) -> Path:
        """Write one HTML page with figures, samples, metrics and configuration, by default into
        the run folder; returns its path. Raises UserError."""
        from trainer.report.report import write_page  # matplotlib

        page = self.folder / REPORT if file is None else Path(file)
        write_page(self.folder, page)
        return page

    def __str__(self) -> str:
        scores = [f"{name} {value:.4g}" for name, value in self.scores.items() if value is not None]
        return ", ".join([f"{self.folder}: {self.step} steps", *scores])

    def _units(self) -> list[Unit]:
        file = self.folder / UNITS
        return read_units(file) if file.is_file() else []


def _is_eval(line: Mapping[str, Any]) -> bool:
    return "eval_loss" in line


def _ranks(allocation: Allocation) -> Iterator[dict[str, Any]]:
    places = dict(zip(allocation.locations.steps, allocation.locations.rows, strict=True))
    for step, ranks in zip(allocation.ranks.steps, allocation.ranks.rows, strict=True):
        chosen = places.get(step)
        for unit, rank in zip(allocation.units, ranks, strict=True):
            row = _row(unit, step, int(rank))
            if places:
                at = -1 if chosen is None else int(chosen[unit.index])
                row["location"] = None if at < 0 else LOCATIONS[at]
            yield row


def _row(unit: Unit, step: int, rank: int) -> dict[str, Any]:
    return {"step": step, "unit": unit.name, "layer": unit.layer, "kind": unit.kind, "rank": rank}


def _table(lines: Iterable[Mapping[str, Any]]) -> Any:
    rows = [dict(line) for line in lines]
    if importlib.util.find_spec("pandas") is None:
        return rows
    import pandas

    return pandas.DataFrame(rows)
