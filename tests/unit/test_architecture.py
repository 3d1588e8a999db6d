"""The shape of the house: packages in an order, imports downward only, files of one purpose.

`LEVELS` is the order. A file may import what is in its own package and in those before it, whether
at its head or inside a function; what is imported for type checkers alone does not count. The test
of a new file therefore says where it belongs.
"""

import ast
import functools
from collections import defaultdict
from pathlib import Path

import pytest

from tests.helpers import ROOT

LEVELS = [
    # adapters: knows no processes, engines or run folders
    "adapters.options", "adapters.registry", "adapters.rounding", "adapters.seeds",
    "adapters.unit", "adapters.banks", "adapters.decision", "adapters.figures",
    "adapters.gated", "adapters.cuda", "adapters.formats", "adapters.mask_table",
    "adapters.trainable", "adapters.active_rows", "adapters.optimizer", "adapters.casts", "adapters.spectral", "adapters.layers", "adapters.token_rows",
    "adapters.starts", "adapters.adapter_set",
    "adapters.units", "adapters.expert_export", "adapters.factors", "adapters.peft_export", "adapters.methods",
    # trainer
    "trainer.errors", "trainer.files", "trainer.device_memory", "trainer.distributed",
    "trainer.tasks", "trainer.config", "trainer.records", "trainer.data", "trainer.model",
    "trainer.engine", "trainer.decisions", "trainer.report", "trainer.trackers", "trainer.loading",
    "trainer.session", "trainer.checkpoint", "trainer.memory", "trainer.verification",
    "trainer.generation", "trainer.training",
    "trainer.export", "trainer.run", "trainer.comparison", "trainer.api",
    "launch",
]  # fmt: skip
"""Packages, and modules that belong to none, from the lowest to the highest."""

LONG = 400
"""Lines of a file, at most."""
SHARE = 1 / 5
"""Of all lines, at most in one package."""
FORBIDDEN = {"trainer.training": {"deepspeed", "bitsandbytes"}, "adapters": {"trainer", "launch"}}
"""What must not be imported, anywhere in a package: the loop knows no engine's library."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by name; a package's `__init__` under the package's name."""
    found = {}
    for top in ("adapters", "trainer", "launch"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Full names of all that a module imports, of this project and others."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module
            # `from a import b`: b may be a module
            inner = {f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in modules()}
            found |= inner or {base}
            found |= {base} if len(inner) < len(node.names) else set()
    return frozenset(found)


def edges() -> list[tuple[str, str]]:
    """(importer, imported) modules of this project."""
    return [(m, other) for m in modules() for other in sorted(imports(m)) if other in modules()]


def level(module: str) -> int:
    """Place of a module in `LEVELS`; of an empty package, below everything."""
    for number, name in enumerate(LEVELS):
        if module == name or module.startswith(f"{name}."):
            return number
    assert modules()[module].name == "__init__.py", f"{module}: no package of LEVELS holds it"
    return -1


def room(module: str) -> str:
    """The package of `LEVELS` that a module belongs to."""
    return LEVELS[level(module)] if level(module) >= 0 else module


@functools.cache
def lines(module: str) -> int:
    return len(modules()[module].read_text(encoding="utf-8").splitlines())


def test_every_module_has_its_place():
    for module in modules():
        level(module)
    assert len(modules()) > 80, "modules were not found"


def test_imports_point_downward():
    upward = [f"{a} imports {b}" for a, b in edges() if level(b) > level(a)]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("unit", ["files", "packages"])
def test_there_is_no_cycle(unit):
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, imported in edges():
        ends = (importer, imported) if unit == "files" else (room(importer), room(imported))
        if ends[0] != ends[1]:
            graph[ends[0]].add(ends[1])
    state: dict[str, int] = {}  # 1: being visited, 2: done

    def visit(node: str, path: list[str]) -> None:
        assert state.get(node) != 1, " -> ".join([*path[path.index(node) :], node])
        if node not in state:
            state[node] = 1
            for following in sorted(graph[node]):
                visit(following, [*path, node])
            state[node] = 2

    for node in list(graph):
        visit(node, [])


def test_files_are_not_too_long():
    too_long = {module: lines(module) for module in modules() if lines(module) > LONG}
    assert not too_long


def test_packages_are_not_too_large():
    sizes: dict[str, int] = defaultdict(int)
    for module in modules():
        sizes[room(module)] += lines(module)
    whole = sum(sizes.values())
    too_large = {
        name: f"{size / whole:.0%}" for name, size in sizes.items() if size > SHARE * whole
    }
    assert not too_large


def test_packages_have_no_logic_of_their_own():
    """But the one that users import: its API comes when it is asked for."""
    for module, file in modules().items():
        if file.name == "__init__.py" and module != "trainer":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            plain = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)  # a docstring, a version
            assert all(isinstance(node, plain) for node in body) and len(body) <= 2, module


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_what_a_package_must_not_know(package):
    for module in modules():
        if module == package or module.startswith(f"{package}."):
            known = {name.split(".")[0] for name in imports(module)}
            assert not known & FORBIDDEN[package], module


def test_unit_tests_mirror_the_packages():
    """Every folder of tests is that of a package."""
    for folder in (ROOT / "tests/unit").rglob("*"):
        if folder.is_dir() and folder.name != "__pycache__" and any(folder.glob("test_*.py")):
            package = folder.relative_to(ROOT / "tests/unit")
            assert (ROOT / package / "__init__.py").is_file(), f"tests/unit/{package}"
