"""Which units keep an adapter in the runs of a comparison: whether seeds and arms agree."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from trainer.comparison.allocation import last_decision
from trainer.comparison.schedule import Schedule
from trainer.errors import UserError
from trainer.files import UNITS


def held(run: Path) -> list[int] | None:
    """The ranks that a run's last decision gave its units, in their order, 0 without an adapter;
    None where the run did not decide by unit."""
    try:
        ranks = last_decision(run)[1].ranks
        units = [unit["name"] for unit in json.loads((run / UNITS).read_text(encoding="utf-8"))]
    except (UserError, OSError):
        return None
    return [ranks.get(name, 0) for name in units] if ranks and ranks.keys() <= {*units} else None


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """|a ∩ b| / |a ∪ b| of the units with a rank above 0; 1 where both are empty."""
    a, b = ({i for i, rank in enumerate(ranks) if rank > 0} for ranks in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


def by_chance(first: Sequence[int], second: Sequence[int]) -> float:
    """The similarity of independent random sets of as many units: their mean intersection over the
    rest of both."""
    a, b = (sum(rank > 0 for rank in ranks) for ranks in (first, second))
    both = a * b / len(first)
    return both / (a + b - both) if a + b else 1.0


def similarity(schedule: Schedule) -> str:
    """A Markdown table of mean Jaccard similarities, between the seeds of each arm that removes
    adapters and, of equal seeds, between it and the arm that it is compared with; "" without such
    arms."""
    ranks = {arm: _by_seed(schedule, arm) for arm in schedule.jobs.comparison.methods}
    ranks = {arm: runs for arm, runs in ranks.items() if any(0 in one for one in runs.values())}
    lines = []
    for arm, runs in ranks.items():
        pairs = {f"{arm}, between seeds": list(itertools.combinations(runs.values(), 2))}
        against = schedule.jobs.comparison.methods[arm].against
        others = ranks.get(against or "", {})
        pairs[f"{arm} and {against}, same seed"] = [
            (one, others[seed]) for seed, one in runs.items() if seed in others
        ]
        for name, found in pairs.items():
            if found:
                ours, chance = (
                    statistics.mean(kind(*pair) for pair in found) for kind in (jaccard, by_chance)
                )
                lines.append(f"| {name} | {ours:.3f} | {chance:.3f} | {len(found)} |")
    if not lines:
        return ""
    head = [
        "| units with an adapter | Jaccard similarity | by chance | pairs |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _by_seed(schedule: Schedule, arm: str) -> dict[int, list[int]]:
    """Of the runs that ended, of equally many units."""
    found = {}
    for job in schedule.final_jobs(arm):
        result = schedule.result(job)
        if result is not None and "error" not in result:
            ranks = result.get("held") or held(schedule.jobs.config(job).run_folder)
            if ranks is not None:
                found[job.seed] = ranks
    return found
