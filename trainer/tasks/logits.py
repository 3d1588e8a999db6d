"""What a model does to its head's output before it returns logits: scales or caps it, or nothing.

    z ↦ s z  (Granite: 1/s is `logits_scaling`; Cohere)        z ↦ c tanh(z / c)  (Gemma 2)

Read from the source of its `forward`, as no attribute has it. `neutral` takes it away from the
model, for an output that is no logits any more.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_HEAD = re.compile(
    r"self\.lm_head\((hidden_states.*|sequence_output|outputs\[0\]|outputs\.last_hidden_state)\)"
)
_SCALE = re.compile(r"logits ([*/]) self\.(config\.)?(\w+)")


@dataclass(frozen=True)
class _Form:
    """Where the number is that a kind of model scales or caps by."""

    attribute: str | None = None
    of_config: bool = False
    divides: bool = False
    caps: bool = False

    def owner(self, model: nn.Module) -> Any:
        return model.config if self.of_config else model


@dataclass(frozen=True)
class LogitMap:
    """A model's change of its head's output."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z: Tensor) -> Tensor | float | None:
        """Changes `z` in place; returns the derivative, None if it is 1."""
        if self.cap is not None:
            z.div_(self.cap).tanh_()
            slope = 1.0 - z * z
            z.mul_(self.cap)
            return slope
        if self.scale == 1.0:
            return None
        z.mul_(self.scale)
        return self.scale


def logit_map(model: nn.Module) -> LogitMap | None:
    """The change by `model`; None where its source shows another one."""
    form = _form(type(model).forward)
    if form is None or form.attribute is None:
        return None if form is None else LogitMap()
    value = getattr(form.owner(model), form.attribute, None)
    if form.caps:
        return LogitMap(cap=None if value is None else float(value))
    if not isinstance(value, int | float):
        return None
    return LogitMap(scale=1.0 / value if form.divides else float(value))


@contextmanager
def neutral(model: nn.Module) -> Iterator[None]:
    """Context in which the model returns its head's output unchanged."""
    form = _form(type(model).forward)
    if form is None or form.attribute is None:
        yield
        return
    own = vars(form.owner(model))  # configurations refuse to have None set
    value = own[form.attribute]
    own[form.attribute] = None if form.caps else 1.0
    try:
        yield
    finally:
        own[form.attribute] = value


@functools.cache
def _form(forward: Callable[..., Any]) -> _Form | None:
    source = re.sub(r"\s*#.*", "", inspect.getsource(inspect.unwrap(forward)))
    made = re.findall(r"^\s*(?:lm_)?logits = (.*)$", source, re.MULTILINE)
    if not made or not _HEAD.fullmatch(made[0]):
        return None
    if len(made) == 1:
        return _Form()
    first = _SCALE.fullmatch(made[1])
    if first is None:
        return None
    operator, of_config, name = first.groups()
    form = _Form(name, of_config=bool(of_config), divides=operator == "/")
    if len(made) == 2:
        # Applied only where there is a number: not what `neutral` takes away.
        return None if re.search(rf"if .*\b{name}\b", source) else form
    path = made[1].partition(" / ")[2]
    capped = [f"logits / {path}", "torch.tanh(logits)", f"logits * {path}"]
    if made[1:] == capped and f"if {path} is not None:" in source:
        return _Form(name, of_config=bool(of_config), caps=True)
    return None
