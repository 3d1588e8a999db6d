"""Tokenise a configuration's data into the cache, and show what is learned of it.

rankcast data configs/quickstart.yaml [section.key=value ...]

Prints the first records as tokens, those marked that are learned, numbers by format and lengths.
"""

import argparse
import sys
from collections.abc import Sequence

from trainer.config.arguments import Parser, at_least
from trainer.distributed.failures import guarded


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--records", type=at_least(0), default=3, help="number of records to show")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    from trainer.config.config import load_config
    from trainer.run.launch import configure_libraries

    configure_libraries()
    config = load_config(arguments.config, arguments.overrides)
    from trainer.data.mixture import MixedDataset
    from trainer.distributed.world import World
    from trainer.report.data_view import show
    from trainer.session import open_data
    from trainer.training.stop_request import StopRequest

    with StopRequest(config.run) as stop:
        tokenizer, _, train, evaluation = open_data(config, World(), stop.raise_if_asked)
    parts = train.named_parts() if isinstance(train, MixedDataset) else {"train": train}
    held = {f"eval {name}".strip(): data for name, data in evaluation.items()}
    for name, data in {**parts, **held}.items():
        show(name, data, tokenizer, config.data, arguments.records)
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
