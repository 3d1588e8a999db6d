"""Draw figures from what runs wrote down, as PNG and SVG.

    python launch/report.py runs/NAME                  its own figures, into runs/NAME/figures
    python launch/report.py runs/A runs/B --out out/   figures that compare runs

Loss; ranks by layer and by matrix type, locations, ω, budget, policy of a run; accuracy against
active parameters and the stability of WeightLoRA's selection of several. What a run has no data
for is not drawn. A run that is still going on can be drawn too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="folder for the figures; one run: RUN/figures")
    arguments = parser.parse_args(argv)
    from trainer.report.report import report

    for figure in report(arguments.runs, arguments.out):
        print(figure)
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
