"""Names of the files in a run folder; atomic replacement, sync and SHA-256 of files."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

METRICS = "metrics.jsonl"
"""A line for every logged step and every evaluation."""
DECISIONS = "allocation.jsonl"
"""A line for every decision; rotated parts of it are `DECISION_PARTS`."""
DECISION_PARTS = "allocation-[0-9]*-[0-9]*.jsonl.gz"
HEARTBEAT = "heartbeat.json"
LOCK = ".lock"
CONFIG = "config.yaml"
UNITS = "units.json"
INITIAL = "initial.safetensors"
"""The initial adapters of a run with spectral initialisation."""
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
    """A temporary path that replaces `file` atomically at the end of the context: readers see the
    old file or the new one, also after a crash. `shared`: other processes may write the same file
    concurrently. Raises OSError."""
    token = f".{secrets.token_hex(4)}" if shared else ""
    partial = file.with_name(f".{file.name}{token}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Replace a file's text atomically. Raises OSError."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """fsync a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
