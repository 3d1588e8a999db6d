"""Names of the files in a run folder; atomic replacement, sync and SHA-256 of files."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

METRICS = "metrics.jsonl"
"""A line for every logged step and every evaluation."""
PREDICTIONS = "predictions.jsonl"
"""The answer to each record of the last evaluation, or of the best one, of a task with answers."""
LOSSES = "losses.jsonl"
"""The loss of each record of that evaluation, where `log.record_losses` asks for it."""
DECISIONS = "allocation.jsonl"
"""A line for every decision; rotated parts of it are `DECISION_PARTS`."""
DECISION_PARTS = "allocation-[0-9]*-[0-9]*.jsonl.gz"
HEARTBEAT = "heartbeat.json"
LOCK = ".lock"
CONFIG = "config.yaml"
UNITS = "units.json"
INITIAL = "initial.safetensors"
"""The initial adapters of a run with spectral initialisation."""
START = "start.safetensors"
"""What the adapters of a run with a data-driven start began from."""
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"
FIGURES = "figures"
BOARD = "tensorboard"
README = "README.md"
REPORT = "report.html"
"""The page that `Result.report` writes."""


def sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def replacing(file: Path, *, shared: bool = False, durable: bool = False) -> Iterator[Path]:
    """A temporary path that replaces `file` atomically at the end of the context: readers see the
    old file or the new one, also after a crash. `shared`: other processes may write the same file
    concurrently. `durable`: also after a power failure. Its mode is the umask's, whatever the
    library that writes it makes of it. Raises OSError."""
    token = f".{secrets.token_hex(4)}" if shared else ""
    partial = file.with_name(f".{file.name}{token}.partial")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        if durable:
            sync(partial)
        partial.replace(file)
        if durable:
            sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end of the context, whole and on disk, in
    place of one that is there; nothing is left of it where the context fails. Raises OSError."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)
            sync(file)
        sync(partial)
        take_place(partial, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(partial: Path, folder: Path) -> None:
    """Rename a folder, in place of one that is there. Raises OSError with the remedy where that one
    cannot be deleted whole (such as one that another user's files are in)."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
        problem = f"{folder} is there and cannot be deleted; accepted: delete or rename it"
        raise OSError(error.errno, problem, str(folder)) from error


def write_text(file: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's text atomically. Raises OSError."""
    with replacing(file, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """fsync a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
