"""How much longer a tokenizer's normaliser makes a text, from its file alone: one that makes a
character into millions would end the process for want of memory, without an error."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_MOST = 1000
"""Characters for one; published normalisers make at most a few dozen of it."""
_NORMALIZER = re.compile(r'(?<!\\)"normalizer"\s*:\s*')


def refuse_growing(folder: Path, key: str) -> None:
    """Raises UserError where the folder's tokenizer.json makes texts more than `_MOST` times as
    long. What cannot be read is left to who loads it."""
    file = folder / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
        found = [
            json.JSONDecoder().raw_decode(text, match.end())[0]
            for match in _NORMALIZER.finditer(text)  # the rest, a vocabulary, is not parsed
        ]
        factor = max(map(_growth, found), default=1.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if factor > _MOST:
        raise UserError(
            f"{key}: {file}: its normalizer can make {factor:.3g} characters of one; accepted: at "
            f"most {_MOST}"
        )


def _growth(part: dict[str, Any] | None) -> float:
    """Characters that a character becomes, at most."""
    if part is None:
        return 1.0
    kind, factor = part["type"], 1.0
    if kind == "Sequence":
        for inner in part["normalizers"]:
            factor *= _growth(inner)
    elif kind == "Replace":
        ((how, pattern),) = part["pattern"].items()
        content = len(part["content"])
        if how == "String":
            factor = content / max(1, len(pattern))
        else:
            factor = content + _matches_nothing(pattern)
    elif kind == "Precompiled":  # a trie, its size before it, and the strings that it leads to
        table = base64.b64decode(part["precompiled_charsmap"] or "")
        strings = table[4 + int.from_bytes(table[:4], "little") :]
        factor = float(max(map(len, strings.split(b"\0"))))
    return max(1.0, factor)


def _matches_nothing(pattern: str) -> bool:
    """Whether a pattern may match between all characters."""
    try:
        return re.match(pattern, "") is not None
    except re.error:  # of another dialect
        return True
