"""Strict YAML and strict sections, with one line for whatever is wrong.

Every message names the key, what was given and what is accepted, with the nearest match.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from adapters.options import Section
from trainer.errors import UserError, first_line

_DEEPEST = 100  # levels of a YAML or JSON document that is no data


def validate(prefix: str, value: Any, kind: type[Section]) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(_explain(prefix, error.errors()[0], kind)) from error


def _explain(prefix: str, error: ErrorDetails, kind: type[BaseModel]) -> str:
    """One line for pydantic's first complaint."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # our own validators name the key themselves
    while len(path) > 1 and (inner := _section_of(kind, path[0])) is not None:
        prefix, kind, path = f"{prefix}.{path[0]}".lstrip("."), inner, path[1:]
    if error["type"] == "extra_forbidden":
        return unknown_key(path[-1], [prefix, *path[:-1]], kind)
    # Members of a union appear in the location ("eval.str"); only keys are of interest.
    fields = [part for part in path if part in kind.model_fields or part.isdigit()] or path
    key = ".".join(part for part in (prefix, *fields) if part)
    if error["type"] == "missing":
        return f"{key}: missing; accepted: {_accepted(kind, fields)}"
    accepted = _accepted(kind, fields, error["msg"])
    if error["type"] == "literal_error":
        accepted += _nearest(error["input"], re.findall(r"'(\w+)'", accepted))
    return f"{key}: {error['input']!r} given; accepted: {accepted}"


def _section_of(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a section within a section."""
    field = kind.model_fields.get(name)
    annotation = None if field is None else field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _accepted(kind: type[BaseModel], path: list[str], message: str = "") -> str:
    """What a field takes: pydantic's own words for bounds and choices, else its type."""
    stated = re.sub(r"^Input should be (a valid )?", "", message)
    field = kind.model_fields.get(path[0]) if path else None  # no path: a key that is no text
    if field is None or (
        stated
        and not message.startswith("Input should be a valid")
        and not _mixed(field.annotation)  # then the message is about one of its members
    ):
        return stated
    return type_name(field.annotation)


def _mixed(annotation: Any) -> bool:
    """Whether words stand beside values of another type, as in `auto or true or false`."""
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


def one_of(key: str, value: Any, known: Mapping[str, Any]) -> str:
    if isinstance(value, str) and value in known:
        return value
    raise UserError(f"{key}: {value!r} given; accepted: {', '.join(known)}{_nearest(value, known)}")


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's floats (`1e-3` is a number), no key given twice, integers of 64 bits, and no
    aliases (a few lines of them stand for more values than memory holds)."""

    _depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}; accepted: written out", event.start_mark
            )
        self._depth += 1
        if self._depth > _DEEPEST:  # its scanner takes time that grows with the square
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {_DEEPEST} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if value.bit_length() > 63:
            raise yaml.constructor.ConstructorError(
                None, None, f"integer of {value.bit_length()} bits; accepted: 63", node.start_mark
            )
        return value

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the strings that `_Loader` would read as numbers; writes no aliases."""

    def ignore_aliases(self, data):
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+0123456789."),
    )


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # its constructors raise whatever a wrong value leads to
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}{line}: not valid YAML ({problem})") from error


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back to the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(text: str | bytes) -> Any:
    """JSON that is no data: ValueError where it is broken, or nested deeper than any of ours."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def local(name: str | Path, key: str = "") -> Path | None:
    """The file or folder of this name; None where there is none. Raises UserError, naming `key`,
    where the system refuses to look: a name that is too long, a folder that is closed to us."""
    try:
        return Path(name) if Path(name).exists() else None
    except OSError as error:
        where = f"{key}: {name}" if key else name
        raise UserError(f"{where}: {error.strerror}; accepted: a path that can be read") from error
