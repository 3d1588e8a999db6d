"""Where tokenised data is cached, and under which key: a digest of all that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.data.dataset import COUNTS, TOKENS
from trainer.data.templates import templates_of
from trainer.errors import UserError
from trainer.files import sha256
from trainer.tasks.base import Task

_VERSION = 2  # of the cached file; raise it when `Example` or an encoding changes
_LOOK = 0.2  # seconds between two looks whether to stop


def cache_root(options: DataOptions) -> Path:
    """Cache folder: tokenised data, matrix decompositions."""
    if options.cache is not None:
        return Path(options.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankcast"


def entry(root: Path, key: str) -> Path:
    """Where an entry is, or goes: one that another user wrote and this one cannot read is none."""
    shared = root / key
    readable = all(os.access(shared / name, os.R_OK) for name in (COUNTS, TOKENS))
    return shared if readable or not os.path.lexists(shared) else root / f"{key}-{os.getuid()}"


def is_whole(folder: Path) -> bool:
    """Whether an entry is there; it is renamed to its place when it is whole."""
    return local(folder / COUNTS, "data.cache") is not None


@contextmanager
def lock(folder: Path, check: Callable[[], None], say: Callable[[str], None]) -> Iterator[Path]:
    """Where this process alone may write what becomes the entry `folder`: a folder beside it, which
    holds what an earlier process has left. Another process that writes the same is waited for;
    `check` is called meanwhile. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = f"{folder.name}.{os.getuid()}"  # another user's could not be written to
    held = FileLock(folder.with_name(f"{name}.lock"))
    is_said = False
    while not held.is_locked:
        try:
            held.acquire(_LOOK)
        except Timeout:
            check()
            if not is_said:
                say(f"waiting   for another process that tokenises the same data ({folder})")
            is_said = True
    try:
        yield folder.with_name(f"{name}.partial")
    finally:
        Path(held.lock_file).unlink(
            missing_ok=True
        )  # before the release: who waits sees it is gone
        held.release()


def former_key(
    named: str, source: str, split: str, limit: int | None, options: DataOptions, task: Task
) -> str:
    """`TokenDataset.key` of the version before, into which a file's path went too: `named`, as the
    data was called then."""
    return cache_key(source, split, limit, options, task, named)


def cache_key(
    source: str,
    split: str,
    limit: int | None,
    options: DataOptions,
    task: Task,
    named: str | None = None,
) -> str:
    """Digest of everything that tokenisation depends on; options of batching are excluded. A file
    is its content, wherever it lies."""
    path = local(source)
    is_file = path is not None and path.is_file()
    content = _sha256(path) if path and is_file else f"{options.subset} {options.revision} {split}"
    named = named or (Path(source).suffix if is_file else source)
    batching = {
        "packing",
        "shuffle",
        "batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "micro_batches_multiple_of",
        "padding_free",
        "row_lengths",
        "cache",
        "train",
        "eval",
        "leave_out",
        "workers",
    }
    limits = {"train_records", "eval_records"}
    template = {"chat_template", "template_arguments"}  # its text counts, not where it lies
    # Keys that older versions did not have: where they are not used, what those wrote is the same.
    newer = ("message_fields", "roles", "as_chat", "system")
    unset = {key for key in newer if not getattr(options, key)}
    parts = [
        _VERSION,
        named,
        content,
        limit,
        options.model_dump(exclude=batching | limits | template | unset),
        task.options.model_dump(),
        task.labels_state(),
        _tokenizer_state(task.tokenizer),
        templates_of(task.tokenizer, options),
        [task.pad_token_id, task.tokenizer.bos_token_id, task.tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: a file that can be read") from error
