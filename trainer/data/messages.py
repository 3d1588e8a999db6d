"""Messages and tools as chat templates take them, whatever fields and roles the data has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.data_options import SourceOptions
from trainer.errors import BadRecord

_SPOKEN = {
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model"),
    "user": ("human",),
}
"""Names of roles that data has and templates have not."""
_SHAREGPT = {
    "assistant": ("assistant",),
    "user": ("user",),
    "system": ("system",),
    "tool": ("tool", "observation", "function", "function_response", "function-response"),
    "function_call": ("function_call", "function-call"),
}
"""Further ones where the role is called `from`; no others are known there."""


def _by_name(roles: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: role for role, names in roles.items() for name in names}


@dataclass(frozen=True)
class Conversation:
    """Messages as templates take them."""

    messages: list[dict]
    turns: list[int]
    """Indices of those that are learned."""
    tools: list[dict] | None
    names: list[str]
    """Of the messages, in what is said of them."""


def is_assistant(message: dict) -> bool:
    return message["role"] == "assistant"


def conversation(
    given: Sequence[tuple[str, Any, bool]],
    system: str | None,
    tools: list[dict] | None,
    options: SourceOptions,
) -> Conversation:
    """A conversation of (name, message as the data has it, whether it may be learned) triples, with
    a `system` message where it does not begin with one. Raises BadRecord."""
    found, turns = [], []
    for index, (name, message, may_be_learned) in enumerate(given):
        message, is_learned = _message(message, name, options)
        found.append(message)
        if is_learned and may_be_learned:
            turns.append(index)
    if not turns:
        column = given[-1][0].partition("[")[0]
        if any(map(is_assistant, found)):
            raise BadRecord(f"{column}: no assistant message that is trained")
        roles = ", ".join(dict.fromkeys(message["role"] for message in found))
        raise BadRecord(
            f"{column}: no assistant message; the roles are {roles} (data.roles says which of them "
            "is the assistant's)"
        )
    names = [name for name, _, _ in given]
    if system and found[0]["role"] not in ("system", "developer"):
        found.insert(0, {"role": "system", "content": system})
        names.insert(0, "system")
        turns = [turn + 1 for turn in turns]
    return Conversation(found, turns, tools, names)


def _message(message: Any, name: str, options: SourceOptions) -> tuple[dict, bool]:
    """(a message as templates take it, whether it is learned)"""
    fields = message if isinstance(message, dict) else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    fields = _renamed(fields, name, options)
    train, weight = fields.pop("train", True), fields.pop("weight", 1)
    if fields.get("role") == "function_call":
        fields |= {"role": "assistant", "tool_calls": _called(fields.pop("content", None))}
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


def _renamed(message: dict, name: str, options: SourceOptions) -> dict:
    """A message with the fields and roles that templates know. Raises BadRecord."""
    names = {source: field for field, source in (options.message_fields or {}).items()}
    role = next((key for key in message if names.get(key) == "role"), None)
    if role is None:
        role = "role" if "role" in message else "from"
        names[role] = "role"
    if "content" not in (names.get(key, key) for key in message):
        names["value"] = "content"
    replaced = set(names.values())
    fields = {
        names.get(key, key): value
        for key, value in message.items()
        if key in names or key not in replaced
    }
    if isinstance(fields.get("role"), str):
        known = _by_name(_SPOKEN) | (_by_name(_SHAREGPT) if role == "from" else {})
        known |= _by_name(options.roles or {})
        if role == "from" and fields["role"] not in known:
            raise BadRecord(
                f"{name}: from {fields['role']!r}; accepted: {', '.join(known)} (data.roles says "
                "which role another name has)"
            )
        fields["role"] = known.get(fields["role"], fields["role"])
    return fields


def _called(value: Any) -> Any:
    """The tool calls that ShareGPT has as a turn of their own, or as its JSON text."""
    calls = from_json(value)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        return calls
    return [
        {"type": "function", "function": call}
        if isinstance(call, dict) and "function" not in call
        else call
        for call in calls
    ]


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
    calls = from_json(calls)
    if not isinstance(calls, list):
        raise BadRecord(f"{name}: tool_calls holds a {type(calls).__name__}; accepted: a list")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"{name}.tool_calls[{index}]: no function with a name")
        arguments = from_json(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise BadRecord(f"{name}.tool_calls[{index}]: its arguments are no JSON object")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def tools_of(tools: Any, column: str) -> list[dict] | None:
    """The tools of a row: a list of JSON schemas, or the JSON text of one."""
    tools = from_json(tools or None)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(name_of(tool), str) for tool in tools):
        raise BadRecord(f"{column}: no list of functions with names")
    return tools


def name_of(tool: Any) -> Any:
    """The name of a tool, or of the one that is called."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def from_json(value: Any) -> Any:
    """What a JSON text holds; everything else, and what is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def no_column(column: str, row: dict) -> str:
    """The reason of a row without a column."""
    return f"no column {column!r}; there are {', '.join(map(str, row)) or 'none'}"
