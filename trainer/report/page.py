"""A run's report as one HTML page that needs nothing else: figures, samples, metrics, settings.

Images are data URIs and the style is in the page, whose policy forbids every request.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.files import PREDICTIONS
from trainer.records.jsonl import final_scores, read_metrics

_SAMPLES = 40
_STEPS = 60
"""Rows of the tables of samples and of logged steps, at most."""
_CHARACTERS = 1200
"""Of a cell, at most."""
_WIDTH = 92
"""Pixels of an inch of a figure, so that all have letters of one size."""
_TILES = {
    "peak_memory_gib": "peak memory (GiB)", "tokens_per_second": "tokens/s",
    "active_parameters": "active parameters",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `kind`: number or text."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table under its own heading. `folded`: shown once it is opened."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return self.title.lower().replace(" ", "-")


def page(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    figures: Iterable[tuple[str, Figure]],
) -> str:
    """The page of the run in `folder`, whose config.yaml and metrics.jsonl were read."""
    from jinja2 import Environment

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    evaluated = [line for line in metrics if "eval_loss" in line]
    logged = [line for line in metrics if "eval_loss" not in line]
    samples = read_metrics(folder / PREDICTIONS)
    tables = [
        _table("Samples", samples[:_SAMPLES]),
        _table("Evaluations", evaluated),
        _table("Steps", _spread(logged, _STEPS), folded=True),
        Table("Configuration", (), [[Cell(key), _cell(v)] for key, v in _flat(config)]),
    ]
    shown = [
        (title, round(_WIDTH * figure.get_figwidth()), _image(figure)) for title, figure in figures
    ]
    model, method = config.get("model", {}), config["method"]
    about = f"{method.get('kind', '')} on {model.get('id', '?')} ({model.get('quantization', '?')})"
    return Environment(autoescape=True).from_string(template).render(
        name=name,
        about=about,
        tiles=_tiles(metrics, logged),
        figures=shown,
        tables=[table for table in tables if table.rows],
    )  # fmt: skip


def _tiles(
    metrics: Sequence[Mapping[str, Any]], logged: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(title, value) of the figures at the top."""
    tiles: list[tuple[str, Any]] = []
    if logged:
        tiles += [("steps", logged[-1]["step"]), ("training loss", logged[-1].get("loss"))]
    tiles += [(k, v) for k, v in final_scores(metrics).items() if k.startswith("eval_")]
    last = logged[-1] if logged else {}
    tiles += [(title, last.get(key)) for key, title in _TILES.items()]
    return [(title, _cell(value).text) for title, value in tiles if value is not None]


def _table(title: str, lines: Sequence[Mapping[str, Any]], *, folded: bool = False) -> Table:
    """A row for each line, a column for each key that any of them has."""
    keys = [*dict.fromkeys(key for line in lines for key in line)]
    rows = [[_cell(line.get(key)) for key in keys] for line in lines]
    return Table(title, keys, rows, folded)


def _cell(value: Any) -> Cell:
    if value is None:
        return Cell("")
    if isinstance(value, bool | str | list | Mapping):
        text = str(value)
        return Cell(text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …")
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.5g}", "number")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(`section.key`, value) of all keys."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        inner = isinstance(value, Mapping) and bool(value)
        found += _flat(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return found


def _spread(lines: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` of the lines, evenly, the last one too."""
    stride = max(1, -(-len(lines) // most))
    return list(lines[::-1][::stride][::-1])


def _image(figure: Figure) -> str:
    """A PNG as base64."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return base64.b64encode(stream.getvalue()).decode("ascii")
