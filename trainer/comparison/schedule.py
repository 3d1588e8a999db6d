"""What to run next: an arm's learning rates, then its seeds, then the LoRA of its parameters."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.comparison.jobs import Job, Jobs, Result, lora_arm
from trainer.comparison.plan import LORA, Arm
from trainer.comparison.search import FACTOR, Found, search

EQUAL = 1.01
"""Parameters up to this factor above LoRA's count as equal to it (such as a slice's Σ)."""


@dataclass(frozen=True)
class Size:
    """Trained parameters of an arm: means over its seeds."""

    trained: float
    """Of its adapters: the mean over the steps, or the number at the end where that is more."""
    others: float
    """Beside adapters: a head."""


class Schedule:
    """The arms of a comparison and the state of each, from the results so far."""

    def __init__(self, jobs: Jobs, code: str | None):
        """`code`: version of the code whose results count; None: of any."""
        self.jobs, self._code = jobs, code
        self._results: dict[str, Result] = {}

    def add(self, result: Result) -> None:
        """Take a result into account; of runs alike the last one, unless it failed."""
        if self._code is not None and result.get("code") != self._code:
            return
        known = self._results.get(result["config"])
        if known is None or "error" not in result or is_failure(known):
            self._results[result["config"]] = result

    def result(self, job: Job) -> Result | None:
        """Of a job's configuration, whichever arm it was made for."""
        return self._results.get(self.jobs.digest(job))

    @property
    def results(self) -> list[Result]:
        """Of this comparison's runs so far, in the order in which they were made."""
        used = {self.jobs.digest(job) for arm in self.arms() for job in self._all_jobs(arm)}
        return [result for digest, result in self._results.items() if digest in used]

    # --- arms ------------------------------------------------------------------------------------

    def arms(self) -> list[str]:
        """All arms: of the file, the curve of LoRA's ranks, and LoRA of the methods' parameters."""
        comparison = self.jobs.comparison
        found = list(comparison.methods)
        if LORA not in comparison.methods:
            return found
        matched = (self.reference(m) for m in found if comparison.match_parameters)
        ranks = {r for r in comparison.lora_ranks if r != self.jobs.rank_of(LORA)}
        curve = [lora_arm(rank) for rank in sorted(ranks)]
        others = {name for name in matched if name is not None} - {*found, *curve}
        return [*found, *curve, *sorted(others)]

    def is_lora(self, arm: str) -> bool:
        """Whether an arm is on LoRA's curve."""
        return arm == LORA or arm not in self.jobs.comparison.methods

    def reference(self, arm: str) -> str | None:
        """The arm that this one is compared with: the one it names, else LoRA of the least rank
        with as many parameters; None of LoRA itself, and while these are not known."""
        comparison = self.jobs.comparison
        if self.is_lora(arm):
            return None
        if comparison.methods[arm].against is not None:
            return comparison.methods[arm].against
        if LORA not in comparison.methods:
            return None
        if not comparison.match_parameters:
            return LORA
        size, lora, rank = self.size(arm), self.size(LORA), self.jobs.rank_of(LORA)
        if size is None or lora is None:
            return None
        least = max(1, math.ceil(size.trained / EQUAL / (lora.trained / rank)))
        return LORA if least == rank else lora_arm(least)

    def size(self, arm: str) -> Size | None:
        """None until all its seeds have run."""
        runs = [self.result(job) for job in self.final_jobs(arm)]
        if not runs or None in runs:
            return None
        ended = [run for run in runs if run is not None and "error" not in run]
        if not ended:
            return None
        trained = [max(r["mean_active_parameters"], r["active_parameters"]) for r in ended]
        others = statistics.mean(run["other_parameters"] for run in ended)
        return Size(statistics.mean(trained) - others, others)

    # --- learning rates --------------------------------------------------------------------------

    def rates(self, arm: str) -> Found:
        """The state of an arm's search; of the arm whose rate it takes."""
        comparison = self.jobs.comparison
        if (owner := self._rate_of(arm)) is not None:
            return self.rates(owner)
        start = self._start(arm)
        if len(start) == 1:
            return Found(best=start[0])
        return search(self._losses(arm, start), start, comparison.learning_rate_bounds)

    def _own(self, arm: str) -> Arm:
        """What the file says of an arm; of a rank of LoRA's curve, what it says of LoRA."""
        methods = self.jobs.comparison.methods
        return methods[arm if arm in methods else LORA]

    def _rate_of(self, arm: str) -> str | None:
        return self._own(arm).rate_of

    def _start(self, arm: str) -> list[float]:
        return self._own(arm).learning_rates or self.jobs.comparison.learning_rates

    def _losses(self, arm: str, start: Sequence[float]) -> dict[float, float]:
        """Mean loss over the selection seeds by learning rate, of those where all have run."""
        found: dict[float, float] = {}

        def is_known(rate: float) -> bool:
            runs = [self.result(job) for job in self._selection_jobs(arm, rate)]
            known = [run for run in runs if run is not None]
            if len(known) == len(runs) or any(run.get("diverged") for run in known):
                found[rate] = _mean(known)
            return rate in found

        for rate in start:
            is_known(rate)
        for first, factor in ((min(start), 1 / FACTOR), (max(start), FACTOR)):
            rate = first * factor
            while is_known(rate):
                rate *= factor
        return found

    def _selection_jobs(self, arm: str, rate: float) -> list[Job]:
        return [Job(arm, rate, seed, True) for seed in self.jobs.comparison.selection_seeds]

    # --- jobs ------------------------------------------------------------------------------------

    def final_jobs(self, arm: str) -> list[Job]:
        """The runs of an arm that are compared; [] until its learning rate is known."""
        best = self.rates(arm).best
        seeds = self.jobs.comparison.seeds if best is not None else []
        return [Job(arm, best, seed, False) for seed in seeds if best is not None]

    def _all_jobs(self, arm: str) -> list[Job]:
        """Of an arm, those that have run or will."""
        start = self._start(arm)
        rates = {*self._losses(arm, start), *self.rates(arm).needed} if len(start) > 1 else set()
        return [job for r in rates for job in self._selection_jobs(arm, r)] + self.final_jobs(arm)

    def wanted(self) -> Iterator[Job]:
        """Jobs without a result, as far as is known by now, in the order in which to make them."""
        return (job for _, job in self.wanted_by_place())

    def wanted_by_place(self) -> Iterator[tuple[int, Job]]:
        """(place of its arm in the file, job): a reference beside its arm, LoRA's curve last."""
        for place, arm in self._order():
            before = self._own(arm).after
            if before is not None and self.size(before) is None:
                continue
            jobs = self.final_jobs(arm)
            if not jobs:
                owner = arm
                while (other := self._rate_of(owner)) is not None:
                    owner = other
                jobs = [
                    j for rate in self.rates(arm).needed for j in self._selection_jobs(owner, rate)
                ]
            yield from ((place, job) for job in jobs if self.result(job) is None)

    def _order(self) -> Iterator[tuple[int, str]]:
        done: set[str] = set()
        methods = list(self.jobs.comparison.methods)
        for place, arm in [*enumerate(methods), *((len(methods), arm) for arm in self.arms())]:
            for one in (arm, self.reference(arm)):
                if one is not None and one not in done:
                    done.add(one)
                    yield place, one


def _mean(runs: Sequence[Result]) -> float:
    """Mean selection loss: ∞ where a run diverged, whatever became of the others."""
    losses = list(map(selection_loss, runs))
    return math.inf if math.inf in losses else statistics.mean(losses)


def selection_loss(result: Result) -> float:
    """Of a selection run; ∞ where it diverged, NaN where it failed otherwise."""
    if result.get("diverged"):
        return math.inf
    loss = result.get("eval_loss")
    return math.nan if loss is None else float(loss)


def is_failure(result: Result) -> bool:
    """Whether a run ended by an error that need not come again."""
    return "error" in result and not result.get("diverged")
