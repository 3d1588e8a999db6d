"""Command-line parser and argument types; errors are one line, before any work starts."""

import os
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from trainer import __version__


class Parser(ArgumentParser):
    """ArgumentParser with errors as in `failures.report`: one line, on rank 0, exit code 2."""

    def __init__(self, description: str | None, prog: str | None = None):
        """`prog`: name of the command; None: the script's name."""
        super().__init__(
            prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter
        )
        self.add_argument("--version", action="version", version=f"rankcast {__version__}")

    def error(self, message: str) -> NoReturn:
        line = f"error: {message.removeprefix('argument ')}\n"
        self.exit(2, line if os.environ.get("RANK", "0") == "0" else "")


def at_least(least: int) -> Callable[[str], int]:
    """Argument type: an integer >= `least`, which must not be negative."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text} given; accepted: {least} or more")
        return int(text)

    return parse


def counts(text: str) -> list[int]:
    """Argument type: distinct positive integers, separated by commas."""
    found = text.split(",") if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ArgumentTypeError(f"{text} given; accepted, by comma: whole numbers, 1 or more")
    numbers = [int(part) for part in found]
    if len(set(numbers)) < len(numbers):
        raise ArgumentTypeError(f"{text} given; accepted: each number once")
    return numbers


def among(names: Collection[str]) -> Callable[[str], list[str]]:
    """Argument type: some of `names`, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(names):
            raise ArgumentTypeError(f"{text} given; accepted, by comma: {', '.join(names)}")
        return found

    return parse


def new_file(text: str) -> Path:
    """Argument type: a path for a file, in an existing folder and not itself a folder."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text} given; accepted: a file in a folder that exists")
    return path
