"""Name the module in which two forward passes of a block part."""

from collections.abc import Mapping

from torch import Tensor

from trainer.verification.calls import Call, Calls, token_errors, typical


def localise(block: str, found: Calls, expected: Calls, tolerance: float) -> str:
    """The innermost module of `block` that makes another output of equal inputs, and the likely
    cause. `found` and `expected`: calls of the run's and of the unmodified model, in order of
    return."""
    theirs = _by_path(expected)
    agreeing: list[str] = []
    for call in found:
        other = theirs.get(call.path, [None]).pop(0) if theirs.get(call.path) else None
        if other is None or not (call.path == block or call.path.startswith(f"{block}.")):
            continue
        argument = _differing(call.inputs, other.inputs, tolerance)
        if call.output is None or other.output is None:
            continue
        if call.output.shape != other.output.shape:
            continue
        if typical(token_errors(call.output, other.output)) <= tolerance:
            agreeing.append(call.path)
            continue
        if argument is None:
            return f"{call.path}: makes another output of the same input; {_cause(call, agreeing)}"
        if not argument.isdigit() and argument != "hidden_states":
            return f"{call.path}: its argument {argument} (mask or positions) is another"
        if call.path == block:
            return f"{block}: its input differs already: the fault lies before the blocks"
    return f"{block}: its output differs, for no module of it alone"


def _cause(call: Call, agreeing: list[str]) -> str:
    inner = [path.rpartition(".")[2] for path in agreeing if path.startswith(f"{call.path}.")]
    if inner:
        return (
            f"the modules in it that agree are {', '.join(inner[:6])}: what lies between them, "
            "such as its attention mask, its scale or its kernel, is wrong"
        )
    return "its operator, its weight or its buffers are wrong"


def _differing(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> str | None:
    """The first argument, of those that both have in one shape, with other values."""
    for name in found.keys() & expected.keys():
        a, b = found[name], expected[name]
        if a.shape == b.shape and not _equal(a, b, tolerance):
            return name
    return None


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not (a.is_floating_point() and b.is_floating_point()):
        return bool((a == b).all())
    finite = a.isfinite() & b.isfinite()  # masks hold −∞
    if not bool((a.isfinite() == b.isfinite()).all()):
        return False
    a, b = a.where(finite, 0), b.where(finite, 0)
    return typical(token_errors(a, b)) <= tolerance


def _by_path(calls: Calls) -> dict[str, list[Call | None]]:
    found: dict[str, list[Call | None]] = {}
    for call in calls:
        found.setdefault(call.path, []).append(call)
    return found
