"""Estimate a run's memory per GPU and whether it fits, without GPU, weights or data (sequences of
`data.max_length` tokens; `--data`: the longest of the records).

rankcast estimate configs/llama70b_random.yaml --gpus 2 [section.key=value ...]

Exit code 0: it fits; 1: it does not.
"""

import argparse
import sys
from collections.abc import Sequence

from trainer.config.arguments import Parser, at_least
from trainer.distributed.failures import guarded
from trainer.errors import UserError


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "--gpus", type=at_least(1), default=1, help="number of GPUs, over all hosts"
    )
    parser.add_argument("--hosts", type=at_least(1), default=1, help="hosts with equally many GPUs")
    parser.add_argument("--memory", type=float, default=139.8, help="GiB per GPU (H200: 139.8)")
    parser.add_argument(
        "--data", action="store_true", help="tokenise the records for their lengths"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    if arguments.gpus % arguments.hosts:
        raise UserError(
            f"--hosts: {arguments.hosts} given with --gpus {arguments.gpus}; accepted: hosts with "
            "equally many GPUs"
        )
    if not 0 < arguments.memory < 2**20:
        raise UserError(f"--memory: {arguments.memory} given; accepted: GiB of a GPU, above 0")
    from trainer.config.config import load_config
    from trainer.run.launch import configure_libraries

    configure_libraries()
    config = load_config(arguments.config, arguments.overrides)
    from trainer.device_memory import GIB
    from trainer.memory.estimate import predict, table

    memory = int(arguments.memory * GIB)
    records = None
    if arguments.data:
        from trainer.distributed.world import World
        from trainer.session import open_data

        _, _, records, _ = open_data(config, World())
    prediction = predict(config, arguments.gpus, memory, arguments.hosts, records)
    print(table(prediction))
    return 0 if prediction.fits else 1


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
