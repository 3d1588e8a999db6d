"""Compare methods on one task: choose learning rates on held-out records, then run several seeds.

rankcast compare benchmarks/gsm8k.yaml OUT --workers 8
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser, at_least
from trainer.distributed.failures import guarded


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("comparison", type=Path, help="YAML file (see trainer/run/comparison.py)")
    parser.add_argument("out", type=Path, help="folder for runs, results.jsonl and table.md")
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="concurrent runs on this machine"
    )
    arguments = parser.parse_args(argv)
    from trainer.run.comparison import compare, read_comparison, table

    comparison = read_comparison(arguments.comparison)
    print(table(comparison, compare(comparison, arguments.out, arguments.workers)))
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
