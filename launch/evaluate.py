"""Evaluate a run's adapter, on any engine and on any data of its task's format, or by the tasks of
EleutherAI's harness.

rankcast evaluate runs/NAME [data.eval=FILE ...] [--predictions answers.jsonl]
rankcast evaluate runs/NAME --tasks arc_easy,boolq [--include-path FOLDER] [--limit 500]
torchrun --nproc_per_node 2 launch/evaluate.py runs/NAME/checkpoints/step-00000100
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.config.config import Config


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run folder or checkpoint folder")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write the answer to each record, as JSONL"
    )
    harness = parser.add_argument_group("EleutherAI's harness (extra `eval`)")
    harness.add_argument("--tasks", help="its tasks, in place of data.eval: arc_easy,boolq")
    harness.add_argument("--include-path", type=Path, help="folder of further task files (YAML)")
    harness.add_argument("--num-fewshot", type=int, help="examples in the prompt; else the task's")
    harness.add_argument("--limit", type=int, help="only so many records of each task")
    harness.add_argument("--batch-size", type=int, help="requests at a time (8)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    from trainer.checkpoint.saved import read_on_all, read_state
    from trainer.config.config import on_engine, with_overrides
    from trainer.export.export import saved_config
    from trainer.generation.evaluation import check_answers
    from trainer.records.jsonl import write_objects
    from trainer.run.launch import configure_libraries, join
    from trainer.training.evaluation import full_evaluation, open_saved

    configure_libraries()
    # Adapters are independent of the engine they were trained with.
    config = on_engine(saved_config(read_state(arguments.source)), "auto")
    config = with_overrides(config, arguments.overrides)
    if arguments.tasks is not None:
        return _by_harness(arguments, config)
    _refuse(arguments, ("include_path", "num_fewshot", "limit", "batch_size"), "without --tasks")
    if config.data.eval is None:
        raise UserError("data.eval: null given; accepted: a file or a hub id to evaluate on")
    with join(config) as world:
        saved = read_on_all(arguments.source, world)
        session = open_saved(config, world, saved)
        with world.all_or_none():
            check_answers(session)
        found = full_evaluation(session)
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


def _refuse(arguments: argparse.Namespace, keys: Sequence[str], where: str) -> None:
    """Raises UserError for arguments that have no effect."""
    for key in keys:
        value = getattr(arguments, key)
        if value is not None:
            raise UserError(
                f"--{key.replace('_', '-')}: {value} given {where}, where it has no effect; "
                "accepted: without it"
            )


def _by_harness(arguments: argparse.Namespace, config: "Config") -> int:
    from trainer.checkpoint.saved import read_on_all
    from trainer.run.launch import join
    from trainer.tasks.registry import TASKS
    from trainer.training.evaluation import open_saved
    from trainer.training.harness import refuse_missing, run_harness

    if TASKS[config.task.kind].peft_task_type != "CAUSAL_LM":
        raise UserError(
            f"--tasks: given, but task.kind={config.task.kind} trains no causal language model; "
            "accepted: a run of one that does, such as causal_lm or multiple_choice"
        )
    for key in ("num_fewshot", "limit", "batch_size"):
        value = getattr(arguments, key)
        least = 0 if key == "num_fewshot" else 1
        if value is not None and value < least:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag}: {value} given; accepted: {least} or more")
    _refuse(arguments, ("predictions",), "with --tasks")
    refuse_missing()
    with join(config) as world:
        saved = read_on_all(arguments.source, world)
        results = run_harness(
            open_saved(config, world, saved), arguments.tasks.split(","),
            include=arguments.include_path, shots=arguments.num_fewshot, limit=arguments.limit,
            batch_size=8 if arguments.batch_size is None else arguments.batch_size,
        )  # fmt: skip
        if world.is_main:
            print(json.dumps({"checkpoint": str(saved.checkpoint), "tasks": results}, default=str))
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
