"""A LeLoRA run's last allocation, permuted among matrices of equal shape, for `method.replay`.

    python -m benchmarks.permuted_allocation runs/NAME /tmp/permuted.jsonl --seed 1

Ranks (and locations) keep their histogram by shape, hence the number of parameters; which matrix
has which is random. Seed 0 leaves the allocation as it is: the run to compare with. Train both with
`method.replay=FILE method.policy.freeze_after=0`.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from adapters.decision import Decision
from trainer.files import UNITS
from trainer.records.jsonl import decision_files, read_objects


def permuted(decision: Decision, shapes: dict[str, tuple[int, int]], seed: int) -> Decision:
    """The decision with ranks and locations exchanged among units of equal shape."""
    rng, source = np.random.default_rng(seed), {name: name for name in decision.ranks}
    for shape in sorted(set(shapes.values())) if seed else ():
        names = [name for name in decision.ranks if shapes[name] == shape]
        source |= dict(zip(names, rng.permutation(names).tolist(), strict=True))
    return Decision(
        ranks={name: decision.ranks[other] for name, other in source.items()},
        locations={name: decision.locations[other] for name, other in source.items()},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="0: as it is")
    given = parser.parse_args(arguments)
    last = None
    for file in decision_files(given.run):
        for line in read_objects(file):
            last = line
    if last is None or last["method"] != "lelora":
        parser.error(f"{given.run}: no decisions of lelora")
    units = json.loads((given.run / UNITS).read_text())
    shapes = {unit["name"]: (unit["out_features"], unit["in_features"]) for unit in units}
    decision = permuted(Decision.from_plain(last), shapes, given.seed)
    line = {"step": 0, "method": "lelora", "digest": decision.digest(), **decision.to_plain()}
    given.out.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
