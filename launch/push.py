"""Upload an exported adapter or model to the hub.

    rankcast push runs/NAME OWNER/REPO         the run's adapter, as its README.md describes it
    rankcast push out/merged OWNER/REPO        a folder that rankcast export wrote
    rankcast push runs/NAME OWNER/REPO --yes   without asking

Lists the files with their sizes first, and asks. A new repository is private, unless --public is
given. Needs a token of the hub with the right to write: HF_TOKEN, or `hf auth login`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run folder, or an exported folder")
    parser.add_argument("repo", metavar="OWNER/REPO", help="model repository; made if it is new")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    from trainer.errors import UserError
    from trainer.export.push import push

    def confirm(description: str) -> bool:
        print(description, flush=True)
        if arguments.yes:
            return True
        if not sys.stdin.isatty():
            raise UserError("--yes: not given, and no terminal to ask on; accepted: --yes")
        return input("Upload? [y/N] ").strip().lower() in ("y", "yes")

    private = not arguments.public
    address = push(arguments.source, arguments.repo, private=private, confirm=confirm)
    print(address or "nothing was uploaded")
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
