"""Record what modules were called with and what they returned, by hooks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.blocks import hidden_state


@dataclass(frozen=True)
class Call:
    """One call of a module, in order of return."""

    path: str
    inputs: Mapping[str, Tensor]
    """Floating-point and mask arguments, by name or position."""
    output: Tensor | None


Calls = list[Call]


@contextmanager
def recorded(blocks: Mapping[str, nn.Module], inside: str | None = None) -> Iterator[Calls]:
    """Context that fills the yielded list with the calls of `blocks`, and of all modules in the
    block `inside`, with their arguments."""
    calls: Calls = []

    def hook(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        named = {**dict(enumerate(args)), **kwargs} if inside else {}
        inputs = dict(_tensors(named))
        calls.append(Call(path, inputs, _first_tensor(output)))

    watched = dict(blocks)
    if inside is not None:
        watched |= {f"{inside}.{name}" if name else inside: module
                    for name, module in blocks[inside].named_modules()}  # fmt: skip
    handles = [
        module.register_forward_hook(_bound(hook, path), with_kwargs=True)
        for path, module in watched.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _bound(hook: Any, path: str) -> Any:
    return lambda module, args, kwargs, output: hook(path, module, args, kwargs, output)


def _first_tensor(output: Any) -> Tensor | None:
    try:
        found = hidden_state(output)
    except (IndexError, KeyError, TypeError):
        return None
    return found.detach() if isinstance(found, Tensor) else None


def _tensors(named: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield str(name), value.detach()
        elif isinstance(value, tuple | list):
            yield from _tensors({f"{name}[{index}]": part for index, part in enumerate(value)})


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """‖found − expected‖ / ‖expected‖ of every vector along the last dimension, such as a token's
    hidden state; infinite where a value is not finite. Each by its own norm: a first token may be
    thirty times as large as all others together. Vectors that nearly vanish count as a tenth of
    the median."""
    if found.shape != expected.shape:
        return torch.tensor([torch.inf])
    expected, found = (t.float().reshape(-1, t.shape[-1] if t.dim() else 1)
                       for t in (expected, found))  # fmt: skip
    norms = torch.linalg.vector_norm(expected, dim=1)
    if not norms.numel():
        return torch.zeros(1)
    norms = norms.clamp(min=float(norms.median()) / 10)
    errors = torch.linalg.vector_norm(found - expected, dim=1)
    return (errors / norms.where(norms > 0, 1.0)).nan_to_num(torch.inf, posinf=torch.inf)


def typical(errors: Tensor) -> float:
    """The error that nine tokens of ten do not exceed."""
    place = min(len(errors) - 1, (9 * len(errors)) // 10)
    return float(errors.sort().values[place])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ (Frobenius, float64); infinite where a value is not
    finite."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = torch.linalg.vector_norm(found.double() - expected)
    norm = torch.linalg.vector_norm(expected)
    value = float(error / norm) if norm > 0 else float(error)
    return value if value == value else float("inf")
