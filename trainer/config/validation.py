"""Format pydantic's errors as one line: key, value given, values accepted, nearest match."""

import difflib
import re
import types
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from adapters.options import Section
from trainer.errors import UserError


def validate(prefix: str, value: Any, kind: type[Section]) -> Any:
    """Validate `value` as a section `kind`; `prefix` precedes its keys in messages. Raises
    UserError with the first error."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(_explain(prefix, error.errors()[0], kind)) from error


def _explain(prefix: str, error: ErrorDetails, kind: type[BaseModel]) -> str:
    """One line for pydantic's first error."""
    path = [str(part) for part in error["loc"]]
    given = prefix
    while len(path) > 1 and (inner := _section_of(kind, path[0])) is not None:
        at = 2 if path[1].isdigit() else 1  # 2: an entry of a list of sections
        prefix, kind, path = ".".join([prefix, *path[:at]]).lstrip("."), inner, path[at:]
    if error["type"] == "value_error":  # our validators name the key, but not an entry of a list
        return str(error["ctx"]["error"]).replace(f"{given}.", f"{prefix}.", prefix != given)
    if error["type"] == "extra_forbidden":
        return unknown_key(path[-1], [prefix, *path[:-1]], kind)
    # Members of a union appear in the location ("eval.str"); keep only keys.
    fields = [part for part in path if part in kind.model_fields or part.isdigit()] or path
    key = ".".join(part for part in (prefix, *fields) if part)
    if error["type"] == "missing":
        return f"{key}: missing; accepted: {_accepted(kind, fields)}"
    accepted = _accepted(kind, fields, error["msg"])
    if error["type"] == "literal_error":
        accepted += _nearest(error["input"], re.findall(r"'(\w+)'", accepted))
    if isinstance(error["input"], dict) and str in _members(kind, fields):
        accepted += (
            f"; a template needs quotes, since YAML reads {{…}} as a mapping: '{{column}}' in a "
            f"file, {key}='\"{{column}}\"' in a shell"
        )
    elif isinstance(error["input"], bool | int | float) and "string" in accepted:
        accepted += "; quotes make a text of what YAML reads as a number, or as true or false"
    return f"{key}: {shown(error['input'])} given; accepted: {accepted}"


def shown(value: Any) -> str:
    """A value of a configuration in messages: what YAML has words for, in its words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _members(kind: type[BaseModel], path: list[str]) -> tuple[Any, ...]:
    """The types that a field accepts."""
    field = kind.model_fields.get(path[0]) if path else None
    if field is None:
        return ()
    return typing.get_args(field.annotation) or (field.annotation,)


def _section_of(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a nested section, or of the entries of a list of sections; None for other
    fields."""
    field = kind.model_fields.get(name)
    return None if field is None else _section_in(field.annotation)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)


def _accepted(kind: type[BaseModel], path: list[str], message: str = "") -> str:
    """Values accepted by a field: pydantic's message for bounds and choices, else its type."""
    stated = re.sub(r"^Input should be (a valid )?", "", message)
    field = kind.model_fields.get(path[0]) if path else None  # no path: a key that is not a string
    if field is None or (
        stated
        and not message.startswith("Input should be a valid")
        and not _mixed(field.annotation)  # then the message is about one member only
    ):
        return stated
    return type_name(field.annotation)


def _mixed(annotation: Any) -> bool:
    """Whether a union mixes literals with other types, as in `auto or true or false`."""
    members = [part for part in typing.get_args(annotation) if part is not type(None)]
    words = [typing.get_origin(part) is Literal for part in members]
    return any(words) and not all(words)


def type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(annotation))
    if origin is list:
        if _section_in(annotation) is not None:
            return "a list of sections"
        return f"a list of {type_name(typing.get_args(annotation)[0])}s"
    if origin is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section of keys"
    names = {str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def unknown_key(key: str, path: list[str], kind: type[BaseModel]) -> str:
    full = ".".join(part for part in (*path, key) if part)
    return f"{full}: unknown key; accepted: {names_of(kind)}{_nearest(key, kind.model_fields)}"


def _nearest(given: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def names_of(kind: type[BaseModel]) -> str:
    return ", ".join(kind.model_fields)


def one_of(key: str, value: Any, known: Collection[str]) -> str:
    """`value` if it is one of the names in `known`; raises UserError otherwise."""
    if isinstance(value, str) and value in known:
        return value
    raise UserError(f"{key}: {value!r} given; accepted: {', '.join(known)}{_nearest(value, known)}")


def local(name: str | Path, key: str = "") -> Path | None:
    """The path of an existing file or folder, else None. Raises UserError naming `key` on system
    errors: a name that is too long, a folder without permission."""
    try:
        return Path(name) if Path(name).exists() else None
    except OSError as error:
        where = f"{key}: {name}" if key else name
        raise UserError(f"{where}: {error.strerror}; accepted: a path that can be read") from error
