"""Terminal view of a run's state, from the files of its folder only."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adapters.decision import Decision
from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.files import DECISIONS, METRICS, UNITS
from trainer.records.heartbeat import EXIT_CODES, EXIT_RUNNING, read_heartbeat
from trainer.records.jsonl import final_scores, read_metrics
from trainer.records.metrics import speed

_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {"done": "green", "interrupted": "yellow", "failed": "red"}
_TAIL = 2**20  # bytes: more than one decision of 10,000 units


def exit_code(folder: Path) -> int:
    """Exit code by the run's state: 0 done, 75 interrupted, 1 failed, 3 still running."""
    return EXIT_CODES.get(_heartbeat(folder)["state"], EXIT_RUNNING)


def view(folder: Path) -> RenderableType:
    """Progress, loss, speed, memory and the current allocation of the run in `folder`."""
    beat = _heartbeat(folder)
    try:
        return _view(folder, beat)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}: not a run folder ({error!r}); accepted: a run folder"
        ) from error


def _view(folder: Path, beat: dict[str, Any]) -> RenderableType:
    lines = read_metrics(folder / METRICS)
    step, steps = beat["step"], beat["steps"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if losses:
        table.add_row("loss", f"{losses[-1]:.4f}  {sparkline(losses)}  from {losses[0]:.4f}")
    evaluated = [line for line in lines if "eval_loss" in line]
    if evaluated:
        table.add_row("evaluation", _scores(evaluated[-1]))
        if "best_step" in evaluated[-1]:
            table.add_row("best", _scores(final_scores(evaluated)))
    if "step_seconds" in beat:
        table.add_row(
            "speed",
            f"{speed(beat)}, {beat['step_seconds']:.3g} s a step",
        )
        peaks = beat.get("peak_memory_gib_by_rank", [beat["peak_memory_gib"]])
        table.add_row("memory", ", ".join(f"{p:.2f}" for p in peaks) + " GiB at most, by rank")
        table.add_row(
            "parameters",
            f"{beat['active_parameters']:,} active of {beat['trainable_parameters']:,}",
        )
        if beat.get("skipped_steps"):
            table.add_row("skipped", f"{beat['skipped_steps']} steps: loss or gradient not finite")
    for name, text in allocation(folder):
        table.add_row(name, text)
    table.add_row("where", " ".join(_where(beat)))
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column()
    head.add_column(ratio=1)
    head.add_row(f"step {step} of {steps}", ProgressBar(total=steps, completed=step))
    title = f"{folder.name}: {_state(beat)}"
    return Panel(Group(head, table), title=Text(title, _COLORS.get(beat["state"], "bold")))


def _scores(line: Mapping[str, Any]) -> str:
    scores = (f"{k} {v:.4g}" for k, v in line.items() if k.startswith("eval_") and v is not None)
    return f"step {line['step']}: {', '.join(scores)}"


def allocation(folder: Path) -> list[tuple[str, str]]:
    """(name, value) rows that summarise the newest decision; [] where there is none (yet)."""
    line = _last_object(folder / DECISIONS)
    if not line:
        return []
    decision = Decision.from_plain(line)
    summary = line.get("summary", decision.summary())  # older runs recorded none
    rows = [(str(name), str(value)) for name, value in summary.items()]
    if len(decision.ranks) > 1:
        rows.append(("by layer", sparkline(_by_layer(folder, decision.ranks))))
    return [*rows, ("decided", f"before step {line['step']}")]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as a row of bars, scaled to minimum and maximum, subsampled to `width`."""
    if not values:
        return ""
    stride = max(1, len(values) / width)
    chosen = [values[int(index * stride)] for index in range(min(width, len(values)))]
    low, high = min(chosen), max(chosen)
    scale = (len(_BARS) - 1) / (high - low or 1)
    return "".join(_BARS[int((value - low) * scale)] for value in chosen)


def _heartbeat(folder: Path) -> dict[str, Any]:
    beat = read_heartbeat(folder)
    kinds = {"state": str, "step": int, "steps": int, "time": float, "pid": int, "host": str}
    if any(not isinstance(beat.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{folder}: no heartbeat.json of a run; accepted: a run folder")
    return beat


def _state(beat: dict[str, Any]) -> str:
    silent = time.time() - beat["time"]
    if beat["state"] not in EXIT_CODES:
        # Loading and evaluation do not update the heartbeat.
        patience = 60 + 3 * beat.get("step_seconds", 60) if beat["state"] == "running" else 3600
        if silent > patience:
            return f"{beat['state']}, but no heartbeat for {_duration(silent)}"
        left = (beat["steps"] - beat["step"]) * beat.get("step_seconds", 0)
        return f"{beat['state']}, {_duration(left)} to go" if left else beat["state"]
    return f"{beat['state']} {_duration(silent)} ago" + (
        f" ({beat['reason']})" if "reason" in beat else ""
    )


def _where(beat: dict[str, Any]) -> list[str]:
    job = [f"SLURM job {beat['slurm_job']},"] if "slurm_job" in beat else []
    return [*job, f"process {beat['pid']} on {beat['host']}"]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _by_layer(folder: Path, ranks: Mapping[str, int]) -> list[float]:
    """Mean rank of each transformer block's units."""
    if all(name.isdigit() for name in ranks):
        return [ranks[name] for name in sorted(ranks, key=int)]
    layers: dict[int, list[int]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # being written
        for unit in parse_json((folder / UNITS).read_text(encoding="utf-8")):
            if unit["layer"] is not None:
                layers.setdefault(unit["layer"], []).append(ranks.get(unit["name"], 0))
    return [sum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)]


def _last_object(file: Path) -> dict[str, Any]:
    """The last complete line of a JSONL file, read from its end."""
    if not file.exists():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            value = parse_json(line)
        except ValueError:  # being written
            continue
        return value if isinstance(value, dict) else {}
    return {}
