"""Compare LeLoRA's learned allocation with uniform, fixed and literal ones.

    python benchmarks/lelora_policies.py OUT --workers 8 [--comparison benchmarks/gsm8k.yaml]

Every policy runs with the same learning rate, steps, batches and seeds. `uniform` redraws every
step from the learned run's histogram of ranks, `fixed random` keeps one such draw, `r s` trains the
same slice of every unit throughout. The table gives each policy's held-out loss, and the difference
of the learned policy's from it, paired over the seeds (negative: the learned one is better).
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from trainer.comparison.jobs import Result
from trainer.comparison.plan import Arm, read_comparison
from trainer.comparison.runner import Limits, compare
from trainer.config.arguments import Parser, at_least
from trainer.distributed.failures import guarded

LEARNED = "learned"
POLICIES = {
    "attributed": [
        "method.policy.credit=attributed", "method.policy.learning_rate=3e-4",
    ],
    "literal": [
        "method.policy.credit=global", "method.policy.learning_rate=1e-3",
        "method.policy.advantage=raw", "method.policy.entropy=0",
        "method.policy.idle_location=true", "method.wake=at_once",
    ],
    "frozen": ["method.policy.mode=frozen"],
    **{
        f"{rank} {location}": [
            f"method.rank={rank}", f"method.ranks=[{rank}]", f"method.locations=[{location}]",
        ]
        for rank in (4, 8)
        for location in ("primary", "medium", "minor")
    },
}  # fmt: skip


def histogram(runs: list[Path], ranks: list[int]) -> list[float]:
    """Relative frequency of each rank over all units, steps and runs."""
    drawn: Counter[int] = Counter()
    for run in runs:
        for line in (run / "allocation.jsonl").read_text(encoding="utf-8").splitlines():
            drawn.update(json.loads(line)["ranks"].values())
    return [drawn[rank] / drawn.total() for rank in ranks]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--comparison", type=Path, default=Path("benchmarks/gsm8k.yaml"))
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=at_least(1), default=5)
    arguments = parser.parse_args()
    ranks = [0, 2, 4, 8]

    def run(policies: dict[str, list[str]]) -> list[Result]:
        common = ["method.kind=lelora", f"method.rank={ranks[-1]}", f"method.ranks={ranks}"]
        job = read_comparison(arguments.comparison).model_copy(
            update={
                "methods": {
                    name: Arm(overrides=[*common, *extra]) for name, extra in policies.items()
                },
                "learning_rates": [arguments.learning_rate],
                "seeds": list(range(arguments.seeds)),
            }
        )
        limits = Limits(arguments.workers)
        return compare([(job, arguments.out)], limits)[0]

    results = run({LEARNED: ["method.policy.step=gradient"], **POLICIES})
    runs = [arguments.out / "runs" / r["run"] for r in results if r["method"] == LEARNED]
    weights = [round(share, 4) for share in histogram(runs, ranks)]
    uniform = ["method.policy.mode=uniform", f"method.policy.rank_weights={weights}"]
    results += run({"uniform": uniform, "fixed random": [*uniform, "method.policy.every=1000000"]})
    print(f"ranks drawn by the learned policy: {dict(zip(ranks, weights, strict=True))}")
    print(table([result for result in results if "error" not in result]))


def table(results: list[Result]) -> str:
    """Markdown, sorted by loss."""
    losses: dict[str, dict[int, float]] = {}
    last = {result["method"]: result for result in results}
    for result in results:
        losses.setdefault(result["method"], {})[result["seed"]] = result["eval_loss"]
    rows = ["| policy | held-out loss | learned minus it | distinct (r, s) | rank |",
            "|---|---|---|---|---|"]  # fmt: skip
    for name in sorted(losses, key=lambda name: statistics.mean(losses[name].values())):
        values = list(losses[name].values())
        pairs = [losses[LEARNED][seed] - loss for seed, loss in losses[name].items()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
        paired = "" if name == LEARNED else f"{statistics.mean(pairs):+.4f} ± {error:.4f}"
        rows.append(
            f"| {name} | {statistics.mean(values):.4f} ± {spread:.4f} | {paired} | "
            f"{last[name].get('distinct_actions')} | {last[name].get('mean_rank'):.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    with guarded():
        main()
