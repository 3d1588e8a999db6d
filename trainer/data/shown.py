"""Whether a rendering shows what a message says.

Templates may change spaces, and write texts as JSON or Python literals. Thoughts of earlier turns
they drop by design.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.data.messages import is_assistant, name_of

REASONING = ("reasoning_content", "reasoning", "thinking")

_THOUGHTS_END = re.compile(r"</[\w:|]*(?:think|thought|reason)\w*>|\[/THINK\]", re.IGNORECASE)
_THOUGHT_OPENED = re.compile(
    r"(?:<[\w:|]*(?:think|thought|reason)\w*>|\[THINK\])\s*\Z", re.IGNORECASE
)
_SWITCH = re.compile(r"/(?:no_?)?think\b")  # in system and user messages, for the template itself


def missing(message: dict, learned: str, before: str) -> str | None:
    """What of a learned turn is not in its learned text: a message, the text of its turn, and the
    text before it. The generation prompt may have opened the thought with which the turn begins."""
    opened = _THOUGHT_OPENED.search(before)
    squeezed = _squeezed((opened.group() if opened else "") + learned)
    own: list[tuple[str, Any]] = [("content", content_of(message))]
    own += [("tool calls", [name_of(c), _arguments(c)]) for c in message.get("tool_calls", ())]
    own += [("reasoning", text) for text in reasoning_of(message)]
    return next((what for what, value in own if not _shows(squeezed, value)), None)


def hidden(messages: Sequence[dict], text: str) -> list[tuple[int, bool]]:
    """(index, whether it is surely left out) of the messages whose contents are not found in the
    rendering of all of them. Contents are searched longest first and each taken out of the text, so
    that one that is left out is not found inside another; that can also take one out which another
    overlaps, hence "surely" only where the whole text does not have it."""
    whole = squeezed = _squeezed(text)
    leaves = [
        (index, leaf)
        for index, message in enumerate(messages)
        for leaf in _leaves(content_of(message))
    ]
    found = []
    for index, leaf in sorted(leaves, key=lambda pair: (-len(_squeezed(pair[1])), -pair[0])):
        ways = [leaf]
        if not is_assistant(messages[index]):
            ways.append(_SWITCH.sub("", leaf))
        elif index < len(messages) - 1:
            ways.append(_THOUGHTS_END.split(leaf)[-1])
        form = _found(ways, squeezed)
        if form is None:
            found.append((index, _found(ways, whole) is None))
        elif form:
            squeezed = squeezed.replace(form, "\0", 1)
    return sorted(found)


def _found(texts: Sequence[str], squeezed: str) -> str | None:
    forms = itertools.chain.from_iterable(map(_forms, texts))
    return next((form for form in forms if form in squeezed), None)


def content_of(message: dict) -> Any:
    """The content of a message; of one in parts, their text."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else content


def reasoning_of(message: dict) -> list[str]:
    """The thoughts of a turn that are given beside its content."""
    found = [message[key] for key in REASONING if isinstance(message.get(key), str)]
    return list(dict.fromkeys(found))


def _arguments(call: dict) -> Any:
    return call.get("function", call).get("arguments")


def _shows(squeezed: str, value: Any) -> bool:
    return all(any(form in squeezed for form in _forms(leaf)) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a value: strings, keys, and numbers and constants as JSON has them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value, default=str)


_PYTHON = {"true": "True", "false": "False", "null": "None"}


def _forms(text: str) -> Iterator[str]:
    """The ways to write a text, without spaces: as it is, in JSON (once or twice), in Python."""
    yield _squeezed(text)
    yield _squeezed(_PYTHON.get(text, text))
    # Spaces at the ends would be escaped, and templates trim them.
    for inner in (text, text.strip()):
        once = json.dumps(inner, ensure_ascii=False)[1:-1]
        yield _squeezed(once)
        yield _squeezed(json.dumps(inner)[1:-1])
        yield _squeezed(json.dumps(once, ensure_ascii=False)[1:-1])
        yield _squeezed(repr(inner)[1:-1])


def _squeezed(text: str) -> str:
    return "".join(text.split())
