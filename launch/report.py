"""Draw figures from the records of runs, as PNG and SVG.

    rankcast report runs/NAME                  figures of one run, in runs/NAME/figures
    rankcast report runs/NAME --html run.html  the same figures, samples, metrics: one page
    rankcast report runs/A runs/B --out out/   figures that compare runs

One run: loss, learning rate, gradient norm, ranks by layer and matrix type, locations, survivors,
ω, budget, policy. Several runs: accuracy against active parameters, stability of WeightLoRA's
selection. Figures without data are omitted. Runs that are still in progress can be drawn too.
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
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page of one run")
    arguments = parser.parse_args(argv)
    from trainer.errors import UserError
    from trainer.report.report import report, write_page

    if arguments.html is not None:
        if len(arguments.runs) > 1 or arguments.out is not None:
            raise UserError("--html: given with --out or several runs; accepted: one run")
        write_page(arguments.runs[0], arguments.html)
        print(arguments.html)
        return 0
    for figure in report(arguments.runs, arguments.out):
        print(figure)
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
