"""Draw figures from the records of runs, as PNG and SVG.

    rankcast report runs/NAME                  figures of one run, in runs/NAME/figures
    rankcast report runs/NAME --html run.html  the same figures, samples, metrics: one page
    rankcast report runs/NAME --sparsity       and of ΔW's sparsity, from the run's checkpoints
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
    parser.add_argument(
        "--sparsity", action="store_true",
        help="also the sparsity of ΔW by layer, from each run's checkpoints (La-LoRA, eq. 1)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.sparsity and len(arguments.runs) > 1:
        parser.error(f"--sparsity: given with {len(arguments.runs)} runs; accepted: one run")
    if arguments.sparsity and arguments.html is not None:
        parser.error("--sparsity: given with --html; accepted: one of them")
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
    if arguments.sparsity:
        from trainer.run.sparsity import report_sparsity

        for figure in report_sparsity(arguments.runs[0], arguments.out):
            print(figure)
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
