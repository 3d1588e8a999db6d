"""The methods by name; the one place that lists them. Nothing is imported before it is asked for.

A line names a method's class, and its options where they can be imported without torch. A method
whose file holds its `Options` too needs its class alone: `"mine": "my_package.mine:Mine"`.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.methods.base import Method
    from adapters.methods.options import MethodOptions

Line = str | tuple[str, str]
"""`module:class` of the method, and of its options; `.module` is one of this package."""


class Methods(MutableMapping[str, "type[Method]"]):
    """Classes by name, imported when they are looked up."""

    def __init__(self, lines: Mapping[str, Line]):
        self._lines: dict[str, Line | type[Method]] = dict(lines)

    def __getitem__(self, name: str) -> "type[Method]":
        line = self._lines[name]
        if isinstance(line, type):
            return line
        return _imported(line if isinstance(line, str) else line[0])

    def __setitem__(self, name: str, line: "Line | type[Method]") -> None:
        self._lines[name] = line

    def __delitem__(self, name: str) -> None:
        del self._lines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def options(self, name: str) -> "type[MethodOptions]":
        """The class of a method's keys."""
        line = self._lines[name]
        return _imported(line[1]) if isinstance(line, tuple) else self[name].Options


METHODS = Methods(
    {
        "lora": (".lora:LoRA", ".options:LoRAOptions"),
        "pissa": (".pissa:PiSSA", ".options:PiSSAOptions"),
        "milora": (".pissa:MiLoRA", ".options:MiLoRAOptions"),
        "adalora": (".adalora:AdaLoRA", ".options:AdaLoRAOptions"),
        "dylora": (".dylora:DyLoRA", ".options:DyLoRAOptions"),
        "rlora": (".weightlora:RLoRA", ".options:RLoRAOptions"),
        "weightlora": (".weightlora:WeightLoRA", ".options:WeightLoRAOptions"),
        "weightlora_plus": (".weightlora:WeightLoRAPlus", ".options:WeightLoRAPlusOptions"),
        "lalora": (".lalora:LaLoRA", ".options:LaLoRAOptions"),
        "lelora": (".lelora.method:LeLoRA", ".lelora.options:LeLoRAOptions"),
    }
)


class Options(Mapping[str, "type[MethodOptions]"]):
    """The classes of the methods' keys by name, imported when they are looked up."""

    def __getitem__(self, name: str) -> "type[MethodOptions]":
        return METHODS.options(name)

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


OPTIONS = Options()


def _imported(line: str) -> Any:
    module, _, name = line.partition(":")
    return getattr(import_module(module, __package__), name)
