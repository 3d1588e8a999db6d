"""Where tokenised data is cached, and under which key: a digest of all that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adapters.options import Section
from trainer.config.data_options import DataOptions, SourceNames
from trainer.config.validation import local
from trainer.data.dataset import COUNTS, TOKENS
from trainer.data.sources import origins
from trainer.data.templates import templates_of
from trainer.tasks.base import Task

_VERSION = 2  # of the cached file; raise it when `Example` or an encoding changes
_ALWAYS = {
    "subset", "revision", "train_split", "eval_split", "format", "prompt", "completion", "text",
    "messages", "tools", "turns", "add_bos", "add_eos", "label", "columns", "quoting",
    "max_length", "on_long_record", "on_bad_record", "kind", "loss_on", "problem",
}  # fmt: skip
"""Options that enter the key whatever their value; no new ones."""
_LOOK = 0.2  # seconds between two looks whether to stop


def cache_root(options: DataOptions) -> Path:
    """Cache folder: tokenised data, matrix decompositions."""
    if options.cache is not None:
        return Path(options.cache)
    return default_root()


def default_root() -> Path:
    """Cache folder where `data.cache` gives none."""
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


def cache_key(
    source: SourceNames, split: str, limit: int | None, options: DataOptions, task: Task
) -> str:
    """Digest of everything that tokenisation depends on; options of batching are excluded. A file
    is its content, wherever it lies."""
    (name, content), *more = origins(source, split, options)
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
        "mixture",
        "mixture_until",
    }
    limits = {"train_records", "eval_records"}
    template = {"chat_template", "template_arguments"}  # its text counts, not where it lies
    parts = [
        _VERSION,
        name,
        content,
        *more,
        limit,
        _given(options, batching | limits | template),
        _given(task.options, set()),
        task.labels_state(),
        _tokenizer_state(task.tokenizer),
        templates_of(task.tokenizer, options),
        [task.pad_token_id, task.tokenizer.bos_token_id, task.tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _given(options: Section, left_out: set[str]) -> dict[str, Any]:
    """The options that enter a key: those that always did, and later ones where they differ from
    their default, so that a new option makes no other data of what is there."""
    fields = type(options).model_fields
    return {
        name: value
        for name, value in options.model_dump(exclude=left_out).items()
        if name in _ALWAYS or value != fields[name].get_default(call_default_factory=True)
    }


def _tokenizer_state(tokenizer: Any) -> str:
    if (tokens := getattr(tokenizer, "tokens", None)) is not None:  # of every image
        return str(tokens)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
