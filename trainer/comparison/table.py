"""The table of a comparison: every arm beside the LoRA of as many parameters."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.comparison.jobs import Job, Result
from trainer.comparison.schedule import Schedule
from trainer.comparison.statistics import MEASURES, Interval, difference, mcnemar, score
from trainer.comparison.worker import describes


@dataclass(frozen=True)
class Row:
    """An arm."""

    arm: str
    runs: list[Result]
    """Of its seeds, those that ended."""
    failed: int
    """Of its seeds, those that diverged or failed."""
    asked: int
    learning_rate: float | None = None
    is_edge: bool = False
    mean: float = 0.0
    spread: float | None = None
    """Standard deviation over the seeds, of two or more."""
    trained: float = 0.0
    own: Interval | None = None
    """Of its score."""
    against: str | None = None
    difference: Interval | None = None
    """Of its score minus that of `against`; of two or more pairs of seeds."""
    pairs: int = 0
    """Seeds of which both have a run."""
    p: float | None = None
    """Of McNemar's test, where the score is the share of right answers."""

    def verdict(self, less_is_better: bool) -> str:
        """Only where the interval excludes 0, and all seeds of both arms count."""
        if self.difference is None:
            return "incomplete" if self.pairs else ""
        if self.failed:
            return f"{self.failed} of {self.asked} failed"
        if self.pairs < self.asked:
            return "incomplete"
        if not self.difference.excludes_0:
            return "ties"
        return "wins" if (self.difference.estimate < 0) == less_is_better else "loses"


def rows(schedule: Schedule) -> list[Row]:
    """All arms, the best first, then those without a run of every seed, then those without any."""
    found = [_row(schedule, arm) for arm in schedule.arms()]
    sign = 1 if MEASURES[schedule.jobs.comparison.score].less_is_better else -1

    def place(row: Row) -> tuple[bool, bool, float]:
        return not row.runs, len(row.runs) + row.failed < row.asked, sign * row.mean

    return sorted(found, key=place)


def _row(schedule: Schedule, arm: str) -> Row:
    name = schedule.jobs.comparison.score
    jobs = schedule.final_jobs(arm)
    asked = len(schedule.jobs.comparison.seeds)
    results = {job.seed: result for job in jobs if (result := schedule.result(job)) is not None}
    good = {seed: r for seed, r in results.items() if r.get(name) is not None}
    failed, rates = len(results) - len(good), schedule.rates(arm)
    if not good:
        return Row(arm, [], failed, asked, rates.best, rates.is_edge)
    values = [run[name] for run in good.values()]
    active = [max(r["mean_active_parameters"], r["active_parameters"]) for r in good.values()]
    kept = [run["records"] for run in good.values()]
    measure, whole = MEASURES[name], all(describes(name, records) for records in kept)
    against = schedule.reference(arm)
    found: Interval | None = None
    pairs, p = 0, None
    if against is not None and whole:
        others = _runs(schedule, schedule.final_jobs(against), name)
        seeds = [seed for seed in good if seed in others]
        pairs = len(seeds)
        paired = [good[s]["records"] for s in seeds], [others[s]["records"] for s in seeds]
        if pairs > 1:
            found = difference(measure, *paired)
            p = mcnemar(*paired) if name == "eval_accuracy" else None
    return Row(
        arm, list(good.values()), failed, asked, rates.best, rates.is_edge,
        statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None,
        statistics.mean(active), score(measure, kept) if whole else None,
        against, found, pairs, p,
    )  # fmt: skip


def _runs(schedule: Schedule, jobs: Sequence[Job], name: str) -> dict[int, Result]:
    """Results with a score, by seed."""
    found = {job.seed: schedule.result(job) for job in jobs}
    return {seed: r for seed, r in found.items() if r is not None and r.get(name) is not None}


def markdown(schedule: Schedule, found: Sequence[Row]) -> str:
    """The table, with a line on seeds, hardware, code and date below it."""
    comparison = schedule.jobs.comparison
    less = MEASURES[comparison.score].less_is_better
    lines = [
        f"| arm | {comparison.score} | minus the arm it is compared with, 95 % interval | against "
        "| verdict | p | trained | touched | exported | learning rate | step, ms | peak, GiB "
        "| runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        rate = "" if row.learning_rate is None else f"{row.learning_rate:.4g}"
        rate += " (edge)" if row.is_edge else ""
        runs = f"{len(row.runs)} of {row.asked}"
        runs += f", {row.failed} failed" if row.failed else ""
        if not row.runs and not row.failed:
            continue
        if not row.runs:
            lines.append(f"| {row.arm} | none | | | | | | | | {rate} | | | {runs} |")
            continue
        change = row.difference
        spread = "" if row.spread is None else f" ± {row.spread:.4f}"
        cells = (
            row.arm,
            f"{row.mean:.4f}{spread}",
            f"{change.estimate:+.4f} [{change.low:+.4f}, {change.high:+.4f}]" if change else "",
            row.against or "",
            row.verdict(less),
            "" if row.p is None else f"{row.p:.3g}",
            f"{row.trained:,.0f}",
            f"{_mean(row, 'touched_parameters'):,.0f}",
            f"{_mean(row, 'exported_parameters'):,.0f}",
            rate,
            f"{1000 * _mean(row, 'step_seconds'):.0f}",
            f"{_mean(row, 'peak_memory_gib'):.2f}",
            runs,
        )
        lines.append(f"| {' | '.join(cells)} |")
    missing = [row.arm for row in found if not row.runs and not row.failed]
    below = _below(schedule) + _decided(found)
    below += f" Without a run of their seeds so far: {', '.join(missing)}." if missing else ""
    return "\n".join([*lines, "", below]) + "\n"


def _mean(row: Row, key: str) -> float:
    return statistics.mean(run[key] for run in row.runs)


def _decided(found: Sequence[Row]) -> str:
    """What the last decisions of the arms that draw actions are like."""
    parts = []
    for row in found:
        if row.runs and all("distinct_actions" in run for run in row.runs):
            part = f"{row.arm} {_mean(row, 'distinct_actions'):.1f}"
            if all("entropy_rank" in run and "entropy_location" in run for run in row.runs):
                ranks, banks = _mean(row, "entropy_rank"), _mean(row, "entropy_location")
                part += f" (entropy {ranks:.2f} of ranks, {banks:.2f} of locations, nats)"
            parts.append(part)
    if not parts:
        return ""
    return f" Different ranks and locations in the last decision, mean: {'; '.join(parts)}."


def _below(schedule: Schedule) -> str:
    """How the table was made."""
    comparison, results = schedule.jobs.comparison, schedule.results

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(one[key]) for one in results if key in one})) or "none"

    edge = (
        " A learning rate at an edge has a neighbour that was not tried or did not end."
        if any(schedule.rates(arm).is_edge for arm in schedule.arms())
        else ""
    )
    return (
        f"Score: mean ± standard deviation over the seeds {comparison.seeds}; learning rates by "
        f"the loss on records left out, mean of the seeds {comparison.selection_seeds}. Trained: "
        "in a step on average, or at the end if more. Intervals: bootstrap over seeds and "
        f"records.{edge} Runs on {all_of('device')}, torch {all_of('torch')}, code "
        f"{all_of('code')}, {all_of('date')}."
    )
