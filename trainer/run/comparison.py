"""Comparison of methods: learning-rate selection per method, runs over seeds, one table.

A comparison is a YAML file:

    base: configs/gsm8k_lora.yaml          # a run's configuration
    overrides: [run.steps=300]             # for every run
    score: eval_loss                       # a loss (less is better), or a metric (more is better)
    learning_rates: [1e-3, 2e-3, 4e-3]     # grid searched for every method
    selection: [run.seed=100, data.leave_out=300, data.eval=left_out]   # overrides of the search
    seeds: [0, 1, 2]
    methods:
      lora: []
      lelora: [method.kind=lelora]

Runs are independent, and several run at a time. `results.jsonl` holds each result with a digest of
the run's configuration: a comparison that was stopped or changed repeats only the runs that failed,
were interrupted or are new.
"""

import hashlib
import json
import multiprocessing
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from adapters.options import Section
from trainer.config.aliases import with_old_names
from trainer.config.config import Config, load_config, with_overrides
from trainer.config.validation import validate
from trainer.config.yaml import parse_json, parse_yaml
from trainer.errors import Diverged, UserError
from trainer.files import METRICS
from trainer.records.jsonl import final_scores, read_metrics

if TYPE_CHECKING:
    import torch

Result = dict[str, Any]


class Comparison(Section):
    """Keys of a comparison's file (see the module's docstring)."""

    base: str
    overrides: list[str] = []
    score: str = "eval_loss"
    learning_rates: list[float]
    selection: list[str] = []
    seeds: list[int]
    methods: dict[str, list[str]]


def read_comparison(path: Path) -> Comparison:
    """Read and validate a comparison's file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; accepted: a comparison's YAML file") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: no mapping; accepted: the keys of a comparison")
    return validate("", raw, Comparison)


def compare(
    comparison: Comparison, out: Path, workers: int, report_line: Callable[[str], None] = print
) -> list[Result]:
    """Run all jobs without a result; returns all results and writes their table, OUT/table.md."""
    out.mkdir(parents=True, exist_ok=True)
    results_file = out / "results.jsonl"
    rates = comparison.learning_rates
    results: list[Result] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare_worker, (context.Value("i", 0),)) as pool:
        if len(rates) > 1:
            jobs = [_job(comparison, out, m, rate) for rate in rates for m in comparison.methods]
            results += _work(pool, jobs, results_file, report_line)
        chosen = {method: choose(results, method, comparison) for method in comparison.methods}
        jobs = [
            _job(comparison, out, method, chosen[method], seed)
            for seed in comparison.seeds
            for method in comparison.methods
        ]
        results += _work(pool, jobs, results_file, report_line)
    (out / "table.md").write_text(table(comparison, results), encoding="utf-8")
    return results


def choose(results: Iterable[Result], method: str, comparison: Comparison) -> float:
    """The learning rate of a method's best selection run."""
    if len(comparison.learning_rates) == 1:
        return comparison.learning_rates[0]
    runs = [r for r in results if r["method"] == method and r["seed"] is None]
    good = [run for run in runs if run.get(comparison.score) is not None]
    if not good:
        raise UserError(f"{method}: no selection run gave {comparison.score}; see results.jsonl")
    best = min if less_is_better(comparison.score) else max
    return best(good, key=lambda run: run[comparison.score])["learning_rate"]


def less_is_better(score: str) -> bool:
    """Of one evaluation set, or of one of several (`eval_SET_loss`)."""
    return score.endswith(("_loss", "_perplexity"))


def table(comparison: Comparison, results: Sequence[Result]) -> str:
    """Markdown table: every method's score over the seeds, learning rate and parameters."""
    score = comparison.score
    lines = [
        f"| method | {score} | learning rate | trainable | mean active | runs |",
        "|---|---|---|---|---|---|",
    ]
    for method in comparison.methods:
        runs = [r for r in results if r["method"] == method and r["seed"] is not None]
        runs = [run for run in runs if run.get(score) is not None]
        values = [run[score] for run in runs]
        if not values:
            lines.append(f"| {method} | no run ended | | | | 0 of {len(comparison.seeds)} |")
            continue
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        trainable = statistics.mean(run["trainable_parameters"] for run in runs)
        active = statistics.mean(run["mean_active_parameters"] for run in runs)
        lines.append(
            f"| {method} | {statistics.mean(values):.4f} ± {spread:.4f} | "
            f"{runs[0]['learning_rate']:g} | {trainable:,.0f} | {active:,.0f} | {len(values)} |"
        )
    return "\n".join(lines) + "\n"


def _job(
    comparison: Comparison, out: Path, method: str, rate: float, seed: int | None = None
) -> tuple[Result, Config]:
    """(identity, configuration) of a run; without a seed, of a selection run."""
    part = "select" if seed is None else f"seed{seed}"
    chosen = comparison.selection if seed is None else [f"run.seed={seed}"]
    overrides = [
        *comparison.overrides, *comparison.methods[method], *chosen,
        f"optim.learning_rate={rate!r}", f"run.dir={out / 'runs'}", "run.resume=never",
    ]  # fmt: skip
    config = load_config(comparison.base, overrides)
    # Without the folder, so that results can be moved, and without what changes no result.
    left_out = {"run": {"dir", "name", "verify"}}
    known_as = with_old_names(config.model_dump(mode="json", exclude=left_out))
    digest = hashlib.sha256(to_json(known_as)).hexdigest()[:16]
    config = with_overrides(
        config, [f"run.name={method.replace(' ', '-')}-{rate:g}-{part}-{digest[:6]}"]
    )
    return {"method": method, "learning_rate": rate, "seed": seed, "config": digest}, config


def _stored_results(file: Path) -> list[Result]:
    """Results of earlier calls; truncated lines are skipped, so that their runs are repeated."""
    results = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            results.append(parse_json(line))
    return [result for result in results if isinstance(result, dict)]


def _work(
    pool: ProcessPoolExecutor,
    jobs: Sequence[tuple[Result, Config]],
    results_file: Path,
    report_line: Callable[[str], None],
) -> list[Result]:
    """Results of all jobs; those that succeeded before are not repeated."""
    done = [result for result in _stored_results(results_file) if "error" not in result]
    results = []
    futures = []
    for identity, config in jobs:
        known = [result for result in done if identity.items() <= result.items()]
        if known:
            results.append(known[-1])
        else:
            futures.append(pool.submit(_run, identity, config))
    for future in as_completed(futures):
        result = future.result()
        results.append(result)
        with results_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        report_line(json.dumps(result))
    return results


_index = 0
"""Of this worker."""


def _prepare_worker(count: Any) -> None:
    """Number a worker."""
    global _index
    with count.get_lock():
        _index = count.value
        count.value += 1


def _worker_device() -> "torch.device":
    """The device of this worker's runs: GPUs round-robin, or one CPU thread."""
    import torch  # late: a mistake in the comparison's file is reported before

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", _index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _run(identity: Result, config: Config) -> Result:
    """One run from start to end, in a worker; a failure is returned as a result."""
    from trainer.distributed.world import World
    from trainer.run.run import run

    try:
        if config.run_folder.exists():  # interrupted or failed
            shutil.rmtree(config.run_folder)
        with suppress(Diverged):  # a result, if a bad one
            run(config, World(device=_worker_device()))
        return {**identity, "run": config.run.name, **summary(config.run_folder)}
    except Exception as error:  # the other runs continue; the table counts the runs
        return {**identity, "error": f"{type(error).__name__}: {error}",
                "where": traceback.format_exc(limit=-3)}  # fmt: skip


def summary(folder: Path) -> Result:
    """Scores of what a finished run exported, averages over its logged steps, and the method's last
    scalars (without those of groups of units)."""
    lines = read_metrics(folder / METRICS)
    steps = [line for line in lines if "active_parameters" in line]
    result = {k: v for k, v in final_scores(lines).items() if k.startswith("eval_")}
    result["mean_active_parameters"] = statistics.mean(s["active_parameters"] for s in steps)
    result["trainable_parameters"] = steps[-1]["trainable_parameters"]
    result["step_seconds"] = statistics.median(s["step_seconds"] for s in steps)
    scalars = {
        k.removeprefix("method/"): v for k, v in steps[-1].items() if k.startswith("method/")
    }
    return {name: value for name, value in scalars.items() if "/" not in name} | result
