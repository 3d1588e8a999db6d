"""Where tokenised data is cached, and under which key: a digest of all that it depends on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from adapters.options import Section
from trainer.config.data_options import DataOptions
from trainer.config.validation import local
from trainer.errors import UserError
from trainer.files import sha256
from trainer.tasks.base import Task

_VERSION = 2  # of the cached file; raise it when `Example` or an encoding changes
_ALWAYS = {
    "subset", "revision", "train_split", "eval_split", "format", "prompt", "completion", "text",
    "messages", "tools", "turns", "add_bos", "add_eos", "label", "columns", "quoting",
    "max_length", "on_long_record", "on_bad_record", "kind", "loss_on", "problem",
}  # fmt: skip
"""Options that enter the key whatever their value; no new ones."""


def cache_root(options: DataOptions) -> Path:
    """Cache folder: tokenised data, matrix decompositions."""
    if options.cache is not None:
        return Path(options.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankcast"


def entry(root: Path, key: str) -> Path:
    """Where an entry is, or goes: one that another user wrote and this one cannot read is none."""
    shared = root / key
    readable = all(os.access(shared / name, os.R_OK) for name in ("counts.json", "tokens.arrow"))
    return shared if readable or not os.path.lexists(shared) else root / f"{key}-{os.getuid()}"


def cache_key(source: str, split: str, limit: int | None, options: DataOptions, task: Task) -> str:
    """Digest of everything that tokenisation depends on; options of batching are excluded. A file
    is its content, wherever it lies."""
    path = local(source)
    is_file = path is not None and path.is_file()
    content = _sha256(path) if path and is_file else f"{options.subset} {options.revision} {split}"
    named = Path(source).suffix if is_file else source
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
    }
    limits = {"train_records", "eval_records"}
    parts = [
        _VERSION,
        named,
        content,
        limit,
        _given(options, batching | limits),
        _given(task.options, set()),
        task.labels_state(),
        _tokenizer_state(task.tokenizer),
        task.tokenizer.chat_template,
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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: a file that can be read") from error
