"""Registry of classes by name, imported on lookup.

An entry names a class (`module:Class`, `.module` relative to the registry's package), and the class
of its options if that can be imported without torch. Otherwise the options are the attribute
`Options` of the class.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, Generic, TypeVar

Line = str | tuple[str, str]
"""The class, or the class and the class of its options."""

T = TypeVar("T")  # the classes
K = TypeVar("K")  # the classes of their options


class Registry(MutableMapping[str, type[T]], Generic[T, K]):
    """Mapping from names to classes; `options` maps names to the classes of their options."""

    def __init__(self, package: str, lines: Mapping[str, Line]):
        self._package = package
        self._lines: dict[str, Line | type[T]] = dict(lines)
        self.options: Mapping[str, type[K]] = _Options(self)

    def __getitem__(self, name: str) -> type[T]:
        line = self._lines[name]
        if isinstance(line, type):
            return line
        return self._imported(line if isinstance(line, str) else line[0])

    def options_of(self, name: str) -> type[K]:
        line = self._lines[name]
        found: Any = self._imported(line[1]) if isinstance(line, tuple) else self[name]
        return found if isinstance(line, tuple) else found.Options

    def __setitem__(self, name: str, line: "Line | type[T]") -> None:
        self._lines[name] = line

    def __delitem__(self, name: str) -> None:
        del self._lines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, name: object) -> bool:  # the inherited one imports
        return name in self._lines

    def _imported(self, line: str) -> Any:
        module, _, name = line.partition(":")
        return getattr(import_module(module, self._package), name)


class _Options(Mapping[str, type[K]]):
    def __init__(self, registry: Registry[Any, K]):
        self._registry = registry

    def __getitem__(self, name: str) -> type[K]:
        return self._registry.options_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry)

    def __len__(self) -> int:
        return len(self._registry)

    def __contains__(self, name: object) -> bool:
        return name in self._registry
