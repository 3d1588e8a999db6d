"""Train from a YAML configuration.

rankcast train --config configs/quickstart.yaml [section.key=value ...]
rankcast train --processes 2 --config ...      # several on this machine
torchrun --nproc_per_node 2 launch/train.py --config ...
deepspeed --num_gpus 2 launch/train.py --config ...
accelerate launch --multi_gpu --num_processes 2 launch/train.py --config ...
srun bash -c '. launch/slurm/rendezvous.sh; exec python launch/train.py --config ...'
"""

import argparse
import sys
from collections.abc import Sequence

from trainer.config.arguments import Parser, at_least
from trainer.distributed import local_ranks
from trainer.distributed.failures import guarded


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved YAML")
    parser.add_argument(
        "--dry-run", action="store_true", help="load shapes and data without training"
    )
    parser.add_argument(
        "--processes", type=at_least(1), metavar="N",
        help="ranks on this machine, one per GPU (without: one process, or another launcher's)",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    if arguments.processes is not None and not local_ranks.is_rank():
        with guarded():
            return local_ranks.run_ranks(arguments.processes)
    from trainer.records import phases
    from trainer.run.launch import import_for_opening, importing, launched

    begun = not arguments.print_config  # whose output is YAML
    with launched(arguments.config, arguments.overrides, announced=begun) as (config, world):
        if arguments.print_config:
            if world.is_main:
                print(config.to_yaml(), end="")
            return 0
        phases.enter("importing transformers and the compiler")
        with importing():
            from trainer.run.dry_run import dry_run
            from trainer.run.run import run
            from trainer.training.stop_request import StopRequest

            import_for_opening(config.engine, world.device)

        if arguments.dry_run:
            text = dry_run(config, world)
            if world.is_main:
                print(text)
            return 0
        with StopRequest(config.run) as stop:
            run(config, world, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
