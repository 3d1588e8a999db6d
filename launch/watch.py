"""Monitor a run from its folder, on any machine that can read it.

rankcast watch runs/NAME            live view until the run ends
rankcast watch runs/NAME --once     print once; the exit code is the state of the run:
                                    0 done, 75 interrupted (start it again), 1 failed,
                                    3 still running
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded
from trainer.records.heartbeat import EXIT_RUNNING
from trainer.report.watch import exit_code, view


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--once", action="store_true", help="print once; exit code by state")
    arguments = parser.parse_args(argv)
    return watch(arguments.run, arguments.once)


def watch(run: Path, once: bool) -> int:
    console = Console()
    if once or not console.is_terminal:
        console.print(view(run))
        return exit_code(run)
    with Live(view(run), console=console, auto_refresh=False) as live:
        took = 0.0
        while exit_code(run) == EXIT_RUNNING:
            time.sleep(max(1.0, 5 * took))  # reading long records takes time
            began = time.monotonic()
            live.update(view(run), refresh=True)
            took = time.monotonic() - began
    return exit_code(run)


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
