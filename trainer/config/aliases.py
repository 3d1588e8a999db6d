"""Renamed keys: the old names are accepted for one release, with a note."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.errors import UserError

RENAMED = {"engine.whole_blocks": "engine.unsharded_blocks"}
"""Current `section.key` by old name."""

_noted: set[str] = set()  # old names reported by this process


def rename_keys(raw: dict[str, Any]) -> list[str]:
    """Rename old keys in a configuration's sections in place; returns the old names found. Raises
    UserError if a key is given by both names."""
    found = []
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        keys = raw.get(section)
        if isinstance(keys, dict) and old_key in keys:
            if new_key in keys:
                raise _given_twice(old)
            raw[section] = {new_key if k == old_key else k: value for k, value in keys.items()}
            found.append(old)
    return found


def rename_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`section.key=value` overrides with new names, the old names found). Raises UserError if a
    key is given by both names."""
    keys = [override.partition("=")[0] for override in overrides]
    found = [old for old in RENAMED if old in keys]
    for old in found:
        if RENAMED[old] in keys:
            raise _given_twice(old)
    renamed = [
        RENAMED.get(key, key) + override.removeprefix(key)
        for key, override in zip(keys, overrides, strict=True)
    ]
    return renamed, found


def note_renamed(found: Iterable[str]) -> None:
    """Print one line per old name, once per process, on rank 0."""
    for old in found:
        if old not in _noted and os.environ.get("RANK", "0") == "0":
            line = f"note: {old} is now {RENAMED[old]}; the old name is removed in the next release"
            print(line, file=sys.stderr, flush=True)
        _noted.add(old)


def _given_twice(old: str) -> UserError:
    return UserError(
        f"{RENAMED[old]}: given together with its old name {old}; accepted: one of them"
    )
