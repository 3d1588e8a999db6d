"""The messages and tools of a row, as chat templates take them."""

import json
from typing import Any

from trainer.errors import BadRecord


def is_assistant(message: dict) -> bool:
    return message["role"] == "assistant"


def messages_of(row: dict, column: str) -> tuple[list[dict], list[int]]:
    """The messages as templates take them, and the indices of the turns to learn."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRecord(no_column(column, row) if column not in row else f"{column}: no messages")
    found, turns = [], []
    for index, message in enumerate(messages):
        message, is_learned = _message(message, f"{column}[{index}]")
        found.append(message)
        if is_learned:
            turns.append(index)
    if not turns:
        some = any(map(is_assistant, found))
        raise BadRecord(f"{column}: no assistant message" + (" that is trained" if some else ""))
    return found, turns


def _message(message: Any, name: str) -> tuple[dict, bool]:
    """(a message as templates take it, whether it is learned)"""
    fields = message if isinstance(message, dict) else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    train, weight = fields.pop("train", True), fields.pop("weight", 1)
    if not isinstance(fields.get("role"), str) or not ("content" in fields or _calls(fields)):
        raise BadRecord(f"{name}: no message with role and content")
    if not isinstance(train, bool):
        raise BadRecord(f"{name}: train {train!r}; accepted: true, false")
    if weight not in (0, 1):
        raise BadRecord(f"{name}: weight {weight!r}; accepted: 0, 1")
    if isinstance(fields.get("content"), list):
        fields["content"] = "".join(_part(part, name) for part in fields["content"])
    assistant = is_assistant(fields)
    if assistant and not isinstance(fields.get("content", ""), str):
        raise BadRecord(
            f"{name}: content holds a {type(fields['content']).__name__}; accepted: text"
        )
    if calls := fields.pop("tool_calls", None):
        fields["tool_calls"] = _parsed_calls(calls, name)
    return fields, assistant and train and weight == 1


def _calls(fields: dict) -> bool:
    return fields["role"] == "assistant" and bool(fields.get("tool_calls"))


def _part(part: Any, name: str) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise BadRecord(f"{name}: content with a part of type {kind!r}; accepted: text")
    return text


def _parsed_calls(calls: Any, name: str) -> list[dict]:
    """Tool calls with their arguments as objects: templates write them as JSON themselves."""
    calls = _from_json(calls)
    if not isinstance(calls, list):
        raise BadRecord(f"{name}: tool_calls holds a {type(calls).__name__}; accepted: a list")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"{name}.tool_calls[{index}]: no function with a name")
        arguments = _from_json(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise BadRecord(f"{name}.tool_calls[{index}]: its arguments are no JSON object")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def tools_of(tools: Any, column: str) -> list[dict] | None:
    """The tools of a row: a list of JSON schemas, or the JSON text of one."""
    tools = _from_json(tools or None)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(name_of(tool), str) for tool in tools):
        raise BadRecord(f"{column}: no list of functions with names")
    return tools


def name_of(tool: Any) -> Any:
    """The name of a tool, or of the one that is called."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _from_json(value: Any) -> Any:
    """What a JSON text holds; everything else, and what is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def no_column(column: str, row: dict) -> str:
    """The reason of a row without a column."""
    return f"no column {column!r}; there are {', '.join(map(str, row)) or 'none'}"
