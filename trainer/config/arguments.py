"""Command lines: a wrong argument is one line, before anything is read or measured."""

import os
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from trainer import __version__


class Parser(ArgumentParser):
    """argparse's, whose mistakes look like all others (`failures.report`): one line, by
    rank 0, exit code 2."""

    def __init__(self, description: str | None, prog: str | None = None):
        """`prog`: what the command is called; None: the script's name."""
        super().__init__(
            prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter
        )
        self.add_argument("--version", action="version", version=f"rankcast {__version__}")

    def error(self, message: str) -> NoReturn:
        line = f"error: {message.removeprefix('argument ')}\n"
        self.exit(2, line if os.environ.get("RANK", "0") == "0" else "")


def at_least(least: int) -> Callable[[str], int]:
    """A whole number, `least` (not below 0) or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text} given; accepted: {least} or more")
        return int(text)

    return parse


def counts(text: str) -> list[int]:
    """Whole numbers, 1 or more, by comma, each once."""
    found = text.split(",") if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ArgumentTypeError(f"{text} given; accepted, by comma: whole numbers, 1 or more")
    numbers = [int(part) for part in found]
    if len(set(numbers)) < len(numbers):
        raise ArgumentTypeError(f"{text} given; accepted: each number once")
    return numbers


def among(names: Collection[str]) -> Callable[[str], list[str]]:
    """Some of `names`, by comma."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(names):
            raise ArgumentTypeError(f"{text} given; accepted, by comma: {', '.join(names)}")
        return found

    return parse


def new_file(text: str) -> Path:
    """A file that can be written: in a folder that exists, itself none."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text} given; accepted: a file in a folder that exists")
    return path
