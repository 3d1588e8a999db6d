"""Files that runs write: what they are called, whole or not there at all, and their SHA-256."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

METRICS = "metrics.jsonl"
"""A line for every logged step and every evaluation."""
DECISIONS = "allocation.jsonl"
"""A line for every decision; the closed parts of it are `DECISION_PARTS`."""
DECISION_PARTS = "allocation-[0-9]*-[0-9]*.jsonl.gz"
HEARTBEAT = "heartbeat.json"
LOCK = ".lock"
CONFIG = "config.yaml"
UNITS = "units.json"
INITIAL = "initial.safetensors"
"""The initial adapters of a run whose method takes them out of the matrices."""
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
FIGURES = "figures"
BOARD = "tensorboard"


def sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end of the context: a reader sees all of the
    new file or all of the old one, also after a crash. `shared`: other processes may be writing the
    same file. Raises OSError."""
    token = f".{secrets.token_hex(4)}" if shared else ""
    partial = file.with_name(f".{file.name}{token}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Replace a file's text. Raises OSError."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make sure that a file (or a folder's entries) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
