"""Compare methods on one task, or several: learning rates, seeds, a table and a figure of each.

rankcast compare benchmarks/smollm2_rte.yaml OUT --workers 8
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser, at_least
from trainer.distributed.failures import guarded
from trainer.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument(
        "comparison", type=Path, nargs="+", help="YAML files (see trainer/comparison/plan.py)"
    )
    parser.add_argument(
        "out", type=Path, help="folder of a folder for each: results, table, figure"
    )
    parser.add_argument("--workers", type=at_least(1), default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, help="start no run after these; 0: only the table")
    parser.add_argument("--any-code", action="store_true", help="use results of other code too")
    parser.add_argument("--variant", action="append", default=[], help="a variant of the file")
    parser.add_argument("--methods", help="only these arms, by comma")
    parser.add_argument("--place", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override for every run"
    )
    parser.add_argument("--keep", type=Path, help="folder to which results are copied in brief")
    parser.add_argument("--seeds", type=at_least(1), help="only the first of the file's seeds")
    arguments = parser.parse_args(argv)
    for place in arguments.place:
        if "=" not in place:
            raise UserError(f"--place: {place} given; accepted: NAME=PATH")
    from trainer.comparison.plan import read_comparison
    from trainer.comparison.runner import Limits, compare

    found = []
    for file in arguments.comparison:
        comparison = read_comparison(
            file, variants=arguments.variant, overrides=arguments.set,
            places=dict(place.split("=", 1) for place in arguments.place),
            methods=arguments.methods.split(",") if arguments.methods else None,
        )  # fmt: skip
        if arguments.seeds is not None:
            kept = comparison.seeds[: arguments.seeds]
            comparison = comparison.model_copy(update={"seeds": kept})
        name = "-".join([file.stem, *arguments.variant])
        found.append((comparison, arguments.out / name))
    limits = Limits(arguments.workers, arguments.minutes, arguments.any_code)
    beside = arguments.out / "-".join(["summary", *arguments.variant])
    compare(found, limits, beside=beside, keep=arguments.keep)
    tables = [folder / "table.md" for _, folder in found]
    for table in [*tables, *([beside.with_suffix(".md")] if len(found) > 1 else [])]:
        print(f"\n{table}\n\n{table.read_text(encoding='utf-8')}")
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
