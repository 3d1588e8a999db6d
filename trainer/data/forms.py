"""Messages in the form that a chat template takes."""

import functools
import json
from typing import Any

from trainer.data.templates import render
from trainer.errors import BadRecord

_PROBE = "Xq7"


def accepted(
    messages: list[dict], tools: list[dict] | None, template: str, tokenizer: Any
) -> list[dict]:
    """The messages in the form that the template takes: contents as text or as lists of parts;
    beside tool calls some want no content, others an empty one, and some arguments as JSON text."""
    if _wants_parts(tokenizer, template):
        messages = list(map(as_parts, messages))
    if not any(message.get("tool_calls") for message in messages):
        return messages
    filled = [{"content": "", **message} for message in messages]
    for form in (messages, filled, _as_text(messages), _as_text(filled)):
        try:
            render(tokenizer, template, form, tools, False)
        except BadRecord:
            continue
        return form
    return messages


def _as_text(messages: list[dict]) -> list[dict]:
    """Messages with the arguments of their tool calls as JSON text."""
    found = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            text = json.dumps(function.get("arguments"), ensure_ascii=False)
            function = {**function, "arguments": text}
            calls.append({**call, "function": function} if "function" in call else function)
        found.append({**message, "tool_calls": calls} if calls else message)
    return found


@functools.lru_cache(maxsize=4)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template shows contents as lists of parts only, not as strings."""

    def shows(content: Any) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return _PROBE in render(tokenizer, template, messages, None, False)[0]
        except BadRecord:
            return False

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def as_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
