"""Train, evaluate, export and watch low-rank adapters of sharded, quantised language models.

    rankcast train      train as one YAML file says, on one process
    rankcast evaluate   evaluate what a run trained
    rankcast export     a LoRA for PEFT, or the merged model
    rankcast estimate   memory that a run takes of a GPU, and whether it fits
    rankcast report     draw figures of runs
    rankcast watch      follow a run from its folder
    rankcast compare    compare methods on one job

`rankcast COMMAND --help` has the arguments. Several processes are started by torchrun or deepspeed,
which take a script in place of the command: `torchrun --nproc_per_node 2 launch/train.py …`.
"""

import importlib
import sys
from collections.abc import Sequence

from trainer.config.arguments import Parser
from trainer.config.validation import one_of
from trainer.distributed.failures import guarded

COMMANDS = ("train", "evaluate", "export", "estimate", "report", "watch", "compare")
"""Modules of this package, each with a `main(argv, prog)`."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, "rankcast")
    parser.add_argument("command", help=", ".join(COMMANDS))
    given = parser.parse_args(argv[:1]).command
    with guarded():
        command = one_of("command", given, COMMANDS)
        module = importlib.import_module(f"launch.{command}")
        return module.main(argv[1:], f"rankcast {command}")
    return 1  # `guarded` has ended the process


if __name__ == "__main__":
    sys.exit(main())
