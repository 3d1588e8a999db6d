"""Train, evaluate, export and watch low-rank adapters of sharded, quantised language models.

    rankcast train      train from a YAML configuration
    rankcast evaluate   evaluate a run's adapter
    rankcast generate   continue prompts with a run's model
    rankcast chat       talk to a run's model
    rankcast export     export a LoRA for PEFT, the merged model, or either as GGUF
    rankcast push       upload an export to the hub
    rankcast estimate   estimate a run's memory per GPU and whether it fits
    rankcast data       tokenise the data, and show what is learned of it
    rankcast report     draw figures of runs
    rankcast watch      monitor a run from its folder
    rankcast compare    compare methods on one task

`rankcast COMMAND --help` lists the arguments. `rankcast train --processes N` trains on N GPUs of
this machine; several machines use torchrun, deepspeed or srun, which take the script instead of
the command: `torchrun --nnodes 2 … launch/train.py …`.
"""

import importlib
import sys
from collections.abc import Sequence

from trainer.config.arguments import Parser
from trainer.config.validation import one_of
from trainer.distributed.failures import guarded

COMMANDS = (
    "train", "evaluate", "generate", "chat", "export", "push", "estimate", "data", "report",
    "watch", "compare",
)  # fmt: skip
"""Modules of this package, each with a `main(argv, prog)`."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, "rankcast")
    parser.add_argument("command", help=", ".join(COMMANDS))
    given = parser.parse_args(argv[:1]).command
    with guarded():
        command = one_of("command", given, COMMANDS)
        module = f"launch.{command}"
        return importlib.import_module(module).main(argv[1:], f"rankcast {command}")
    return 1  # not reached: `guarded` exits the process


if __name__ == "__main__":
    sys.exit(main())
