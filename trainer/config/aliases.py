"""Old names of keys: accepted for one release, with a note."""

import os
import sys
from typing import Any

from trainer.errors import UserError

RENAMED = {"engine.whole_blocks": "engine.unsharded_blocks"}
"""Keys by their old name."""


def rename_keys(raw: dict[str, Any]) -> list[str]:
    """Replace old keys of a nested dictionary, in place; returns those that were found. Raises
    UserError where a key is given by both names."""
    found = []
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        keys = raw.get(section)
        if not isinstance(keys, dict) or old_key not in keys:
            continue
        if new_key in keys:
            raise _given_twice(old, new)
        keys[new_key] = keys.pop(old_key)
        found.append(old)
    return found


def rename_overrides(overrides: dict[str, str]) -> list[str]:
    raise NotImplementedError


def _given_twice(old: str, new: str) -> UserError:
    return UserError(f"{new}: given together with its old name {old}; accepted: one of them")
