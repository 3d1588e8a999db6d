"""Comparison of methods: runs on all GPUs, several at a time, results by which it is resumed.

A job starts as soon as a worker is free and what it depends on is known: an arm's seeds when its
learning rate is, the LoRA of as many parameters when these are. `results.jsonl` holds every result
under a digest of its configuration and the version of the code: a comparison that was stopped or
changed repeats only runs that failed, were interrupted or are new.
"""

import heapq
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.comparison.figure import draw
from trainer.comparison.jobs import Job, Jobs, Result, code_version
from trainer.comparison.kept import read_kept, write_kept
from trainer.comparison.plan import Comparison
from trainer.comparison.schedule import Schedule, is_failure
from trainer.comparison.summary import Table, draw_summary, summary
from trainer.comparison.survivors import similarity
from trainer.comparison.table import markdown, rows
from trainer.comparison.worker import make_run, prepare
from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.files import write_text

RESULTS = "results.jsonl"
Report = Callable[[str], None]

_IN_VAIN = 8
"""Runs that all failed alike, the first of a call, after which it starts no other."""


@dataclass(frozen=True)
class Limits:
    """Of one call."""

    workers: int = 1
    """Runs at a time."""
    minutes: float | None = None
    """After which no run is started, so that those at work end; None: none."""
    any_code: bool = False
    """Use results of other versions of the code."""


class Part:
    """One comparison of a call, in its folder."""

    def __init__(self, comparison: Comparison, folder: Path, limits: Limits, report: Report):
        self.folder, self._report = folder, report
        folder.mkdir(parents=True, exist_ok=True)
        self.schedule = Schedule(
            Jobs(comparison, folder / "runs"), None if limits.any_code else code_version()
        )
        kept = read_kept(self.schedule.jobs, folder)
        stored = [*kept, *read_results(folder / RESULTS)]
        others = sum(one.get("code") != code_version() for one in stored)
        if others:
            use = "used" if limits.any_code else "not used (--any-code uses them)"
            report(f"note: {folder}: {others} results of other code, {use}")
        for result in stored:
            if not is_failure(result):
                self.schedule.add(result)

    def take(self, result: Result) -> None:
        """Keep a result, and report it in a line."""
        self.schedule.add(result)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        brief = {k: v for k, v in result.items() if k not in ("records", "where")}
        self._report(json.dumps(brief))

    def write(self) -> Table:
        """Write table and figure of the results so far; returns what they show."""
        found = rows(self.schedule)
        text = markdown(self.schedule, found)
        if similar := similarity(self.schedule):
            text += f"\n{similar}"
        write_text(self.folder / "table.md", text)
        draw(self.schedule, found, self.folder / "figure.png")
        return self.schedule, found


def compare(
    comparisons: Sequence[tuple[Comparison, Path]],
    limits: Limits = Limits(),
    report: Report = print,
    *,
    beside: Path | None = None,
    keep: Path | None = None,
) -> list[list[Result]]:
    """Make the runs of comparisons, each with its folder, that have no result; the first arm of
    every comparison, then the second one: what was stopped has the same rows in all. Writes
    results.jsonl, table.md and figure.png of each, of several ones also `beside`.md and .png, and
    to `keep` the results in brief. Returns each one's results. Raises UserError where the first
    runs all fail alike: others would too, of a model that is not there, say."""
    parts = [Part(comparison, folder, limits, report) for comparison, folder in comparisons]
    failure = None
    if next(_wanted(parts, set()), None) is not None and limits.minutes != 0:
        failure = _work(parts, limits)
    tables = {part.folder.name: part.write() for part in parts}
    if beside is not None and len(parts) > 1:
        write_text(beside.with_suffix(".md"), summary(tables))
        draw_summary(tables, beside.with_suffix(".png"))
    if keep is not None:
        for part in parts:
            write_kept(part.schedule, keep / part.folder.name)
    if failure is not None:
        raise UserError(f"the first {_IN_VAIN} runs or more all failed with {failure}")
    return [part.schedule.results for part in parts]


def _wanted(parts: Sequence[Part], begun: set[tuple[int, str]]) -> Iterator[tuple[int, Job]]:
    """(part, job) of what can be run and was not begun."""

    def of(number: int) -> Iterator[tuple[int, int, Job]]:
        schedule = parts[number].schedule
        for place, job in schedule.wanted_by_place():
            if (number, schedule.jobs.digest(job)) not in begun:
                yield place, number, job

    for _, number, job in heapq.merge(*map(of, range(len(parts))), key=lambda one: one[:2]):
        yield number, job


def _work(parts: Sequence[Part], limits: Limits) -> str | None:
    """Run until nothing is wanted, or the time is up, or that is in vain; returns why."""
    context = multiprocessing.get_context("spawn")
    ends = time.monotonic() + 60 * (limits.minutes or 1e9)
    begun: set[tuple[int, str]] = set()
    running: dict[Future[Result], int] = {}
    ended, errors = 0, list[str]()  # first lines
    with ProcessPoolExecutor(limits.workers, context, prepare, (context.Value("i", 0),)) as pool:
        while True:
            in_vain = len(errors) == ended >= _IN_VAIN and len(set(errors)) == 1
            starts = time.monotonic() < ends and not in_vain
            free = limits.workers - len(running) if starts else 0
            for _ in range(free):
                found: tuple[int, Job] | None = next(_wanted(parts, begun), None)
                if found is None:
                    break
                number, job = found
                jobs = parts[number].schedule.jobs
                begun.add((number, jobs.digest(job)))
                identity = job.result(jobs.digest(job), code_version())
                made = pool.submit(make_run, identity, jobs.config(job), jobs.replayed(job))
                running[made] = number
            if not running:
                return errors[0] if in_vain else None
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                parts[running.pop(future)].take(result)
                ended += 1
                errors += [result["error"].partition("\n")[0]] if is_failure(result) else []


def read_results(file: Path) -> list[Result]:
    """Results of earlier calls; truncated lines are skipped, so that their runs are repeated."""
    results = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            results.append(parse_json(line))
    return [result for result in results if isinstance(result, dict) and "config" in result]
