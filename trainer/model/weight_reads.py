"""Find layers whose weight the model reads itself instead of calling the layer.

Mamba's `dt_proj` is one: the block multiplies by `self.dt_proj.weight`, so an adapter in that layer
would have no effect and no gradient, and a packed weight has another shape. RWKV scales weights in
place before it evaluates, which would destroy packed ones. No attribute tells; as
`chunked_cross_entropy.py` does, this reads the source, of the classes of a model's modules.

A read counts unless it is in a branch that this model does not take: its condition is evaluated
from the module's plain attributes and its configuration, with optional arguments (caches,
precomputed queries; not masks) at their default. What cannot be evaluated counts, such as a branch
that needs certain kernels: a run has the same units on every machine.
"""

import ast
import functools
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from adapters.units import is_conv1d, is_linear

_HARMLESS = frozenset((
    "device", "dtype", "is_cuda", "is_meta", "itemsize", "element_size", "layout", "ndim", "dim",
    "requires_grad", "requires_grad_",
))  # fmt: skip
"""Attributes of a weight that depend neither on its values nor on its shape."""

_SAME_ELEMENTS = frozenset(("iter", "list", "reversed", "tuple"))
_QUESTIONS = frozenset(("isinstance", "hasattr", "id", "type"))
_NOT_RUN = ("__init__", "_init", "init", "reset_", "tie_", "_tie", "resize_", "_resize")
"""How names of methods begin that make a model or change its size."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_UNKNOWN = object()

Path = tuple[str, ...]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def layers_read(model: nn.Module) -> set[str]:
    """Paths of the linear layers whose `weight` is read by a module above them."""
    patterns = {
        ".".join((path, *read)) if path else ".".join(read)
        for path, module in model.named_modules()
        if any(True for _ in module.children())
        for read in weights_read(module)
    }
    exact = {pattern for pattern in patterns if "*" not in pattern}
    wild = patterns - exact
    return {
        path
        for path, module in model.named_modules()
        if (is_linear(module) or is_conv1d(module))
        and (path in exact or any(fnmatchcase(path, pattern) for pattern in wild))
    }


def weights_read(module: nn.Module) -> set[Path]:
    """Paths, relative to `module`, of the modules below it whose weight its methods read; `*` is
    an element of a list."""
    cls: type = type(module)
    methods = _methods(cls)
    if not any(method.reads_weights for method in methods.values()):
        return set()
    called_inside = {name for method in methods.values() for name in method.mentions}
    waiting = [
        name
        for name in methods
        if name == "forward" or not (name in called_inside or name.startswith(_NOT_RUN))
    ]
    found, done = set(), set(waiting)
    while waiting:
        live = _Live(methods[waiting.pop()], module)
        found |= live.reads
        new = live.mentions & methods.keys() - done
        done |= new
        waiting += new
    return found


@dataclass(frozen=True, eq=False)
class _Method:
    tree: _Function
    mentions: frozenset[str]
    """Attributes of the module that it uses."""
    reads_weights: bool
    """Whether it names the weight of another module at all."""


@functools.cache
def _methods(cls: type) -> dict[str, _Method]:
    """The methods of a class by name, inherited ones too, but for those of nn.Module."""
    methods: dict[str, _Method] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for statement in _class_body(base):
            if isinstance(statement, _Function) and statement.name not in methods:
                nodes = [n for n in ast.walk(statement) if isinstance(n, ast.Attribute)]
                mentions = frozenset(n.attr for n in nodes if _is_self(n.value))
                reads = any(n.attr == "weight" and not _is_self(n.value) for n in nodes)
                methods[statement.name] = _Method(statement, mentions, reads)
    return methods


def _class_body(cls: type) -> list[ast.stmt]:
    classes = _classes(cls.__module__)
    return classes[cls.__qualname__].body if cls.__qualname__ in classes else []


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a Python module."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # without source, such as C extensions
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


class _Live(ast.NodeVisitor):
    """What a method does in the branches that `module` takes: `reads`, the paths of the modules
    whose weight it reads, and `mentions`, the attributes of the module that it uses."""

    def __init__(self, method: _Method, module: nn.Module):
        self.module = module
        self.reads: set[Path] = set()
        self.mentions: set[str] = set()
        self._locals = dict(_assigned(method.tree))
        self._defaults = _defaults(method.tree)
        for statement in method.tree.body:
            self.visit(statement)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        taken = self._value(node.test)
        branches = [node.body] if taken is _UNKNOWN or taken else []
        branches += [node.orelse] if taken is _UNKNOWN or not taken else []
        for branch in branches:
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)

    visit_IfExp = visit_If

    def visit_Compare(self, node: ast.Compare) -> None:
        """Comparing a weight with None does not read it."""
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_self(node.value):
            self.mentions.add(node.attr)
        inner = node.value
        if node.attr in _HARMLESS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = self._path(inner)
            if path:
                self.reads.add(path)
        self.generic_visit(node)

    def _path(self, node: ast.expr) -> Path | None:
        """The path of a module that an expression gives, () for the module itself."""
        match node:
            case ast.Name(id="self"):
                return ()
            case ast.Name(id=name) if name in self._locals:
                return self._local(name, self._path, None)
            case ast.Attribute(value=inner, attr=last):
                path = self._path(inner)
                return None if path is None else (*path, last)
            case ast.Subscript(value=inner, slice=ast.Slice()):
                return self._path(inner)
            case ast.Subscript(value=inner):
                path = self._path(inner)
                return None if path is None else (*path, "*")
            case ast.Call(func=ast.Name(id=name), args=[inner]) if name in _SAME_ELEMENTS:
                return self._path(inner)
        return None

    def _value(self, node: ast.expr) -> Any:
        """The value of a condition, or `_UNKNOWN`."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                value = self._value(inner)
                return value if value is _UNKNOWN else not value
            case ast.BoolOp(op=op, values=parts):
                decisive = isinstance(op, ast.Or)
                values = [self._value(part) for part in parts]
                if any(v is not _UNKNOWN and bool(v) == decisive for v in values):
                    return decisive
                return _UNKNOWN if _UNKNOWN in values else not decisive
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                sides = self._value(left), self._value(right)
                if _UNKNOWN in sides:
                    return _UNKNOWN
                try:
                    return _COMPARISONS[type(op)](*sides)
                except TypeError:
                    return _UNKNOWN
            case ast.Name(id=name) if name in self._locals:
                return self._local(name, self._value, _UNKNOWN)
            case ast.Name(id=name):
                return self._defaults.get(name, _UNKNOWN)
            case ast.Attribute():
                return self._attribute(node)
        return _UNKNOWN

    def _local(self, name: str, evaluate: Callable[[ast.expr], Any], unknown: Any) -> Any:
        """A local variable, evaluated by what was assigned to it."""
        assigned = self._locals[name]
        if assigned is None:
            return unknown
        self._locals[name] = None  # while it is evaluated: two may be made from each other
        value = evaluate(assigned)
        self._locals[name] = assigned
        return value

    def _attribute(self, node: ast.Attribute) -> Any:
        """A plain attribute of the module or its configuration."""
        path = self._path(node)
        if path is None or "*" in path or path[-1] == "training":
            return _UNKNOWN
        value: Any = self.module
        for name in path:
            try:
                value = getattr(value, name)
            except Exception:  # whatever a property raises
                return _UNKNOWN
        plain = value is None or isinstance(value, bool | int | float | str)
        return value if plain else _UNKNOWN


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@functools.cache
def _assigned(function: _Function) -> dict[str, ast.expr | None]:
    """What each local variable is assigned, None for several values; a loop's variable is an
    element of what it runs over."""
    arguments = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    simple: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                simple.setdefault(name, []).append(value)
            case ast.For() | ast.comprehension():
                for name, over in _run_over(node.target, node.iter):
                    simple.setdefault(name, []).append(ast.Subscript(over, ast.Constant(0)))
    stored = Counter(
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    once = {n: v[0] for n, v in simple.items() if stored[n] == 1 and n not in arguments}
    return dict.fromkeys(stored) | once


def _run_over(target: ast.expr, over: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The variables of a loop and what each runs over, also in `enumerate` and `zip`."""
    match target, over:
        case ast.Name(id=name), _:
            yield name, over
        case ast.Tuple(elts=[_, inner]), ast.Call(func=ast.Name(id="enumerate"), args=[first, *_]):
            yield from _run_over(inner, first)
        case ast.Tuple(elts=names), ast.Call(func=ast.Name(id="zip"), args=arguments):
            for one, argument in zip(names, arguments, strict=False):
                yield from _run_over(one, argument)


@functools.cache
def _defaults(function: _Function) -> dict[str, Any]:
    """The arguments that default to None or False, but for masks, and are not assigned."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [
        *zip(reversed(positional), reversed(arguments.defaults), strict=False),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {
        argument.arg: default.value
        for argument, default in pairs
        if isinstance(default, ast.Constant)
        and (default.value is None or default.value is False)
        and "mask" not in argument.arg
    }
