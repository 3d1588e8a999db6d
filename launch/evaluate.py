"""Evaluate a run's adapter, on any engine and on any data of its task's format.

rankcast evaluate runs/NAME [data.eval=FILE ...] [--predictions answers.jsonl]
torchrun --nproc_per_node 2 launch/evaluate.py runs/NAME/checkpoints/step-00000100
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded
from trainer.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run folder or checkpoint folder")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write the answer to each record, as JSONL"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    from trainer.checkpoint.saved import read_on_all, read_state
    from trainer.config.config import on_engine, with_overrides
    from trainer.export.export import saved_config
    from trainer.records.jsonl import write_objects
    from trainer.run.launch import configure_libraries, join
    from trainer.training.evaluation import full_evaluation, open_saved

    configure_libraries()
    # Adapters are independent of the engine they were trained with.
    config = on_engine(saved_config(read_state(arguments.source)), "auto")
    config = with_overrides(config, arguments.overrides)
    if config.data.eval is None:
        raise UserError("data.eval: null given; accepted: a file or a hub id to evaluate on")
    with join(config) as world:
        saved = read_on_all(arguments.source, world)
        found = full_evaluation(open_saved(config, world, saved))
        with world.all_or_none():
            if world.is_main and arguments.predictions is not None:
                if not found.answers:
                    raise UserError(
                        f"--predictions: given, but task.kind={config.task.kind} answers nothing; "
                        "accepted: without it"
                    )
                try:
                    write_objects(arguments.predictions, found.answers)
                except OSError as error:
                    raise UserError(
                        f"--predictions {arguments.predictions}: cannot be written "
                        f"({error.strerror})"
                    ) from error
        if world.is_main:
            scores = {"checkpoint": str(saved.checkpoint), **found.scores, **found.cost}
            print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
