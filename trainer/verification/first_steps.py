"""The proof's second half: in the first optimizer steps of a new run every adapter trains.

A unit is dead if none of its tensors had a gradient other than exactly 0 in the first steps, or if
its B is still exactly 0 after an update although its active components had a gradient. Not dead are
components that the method has masked, and experts that saw no token.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters.unit import Unit
from trainer.engine.base import Update
from trainer.errors import RunFailed
from trainer.records.recorder import Recorder
from trainer.session import Session
from trainer.verification.examples import examples
from trainer.verification.forward import as_verified

_STEPS = 3
"""Steps in which a unit may have no gradient, such as one whose gates all start at 0."""
_NAMED = 3  # units in a message


class FirstSteps:
    """Watches the first steps; `done` once every unit has proved to train."""

    def __init__(self, session: Session, recorder: Recorder):
        self._session, self._recorder = session, recorder
        self._waiting = {unit.name for unit in session.method.units}
        """Units that have not had a gradient yet."""
        self._moving: list[str] = []
        """Units whose active components have one in this step."""
        self._left = _STEPS
        self.done = not self._waiting

    @torch.no_grad()
    def before_update(self) -> None:
        """Called with the reduced gradients, before they are clipped."""
        if self.done:
            return
        adapters = self._session.method.adapters
        self._waiting &= set(adapters)
        names = list(adapters)
        tensors = [
            [t for t in (adapters[name].A, adapters[name].g, adapters[name].B) if t.requires_grad]
            for name in names
        ]
        reached = _any_nonzero([[t.grad for t in of_unit] for of_unit in tensors])
        self._waiting -= {
            name for name, is_reached in zip(names, reached, strict=True) if is_reached
        }
        active = [
            [adapter.B.grad * adapter.mask.unsqueeze(1)] if adapter.B.grad is not None else []
            for adapter in adapters.values()
        ]
        moving = _any_nonzero(active)
        self._moving = [name for name, moves in zip(names, moving, strict=True) if moves]

    @torch.no_grad()
    def after_update(self, update: Update) -> None:
        """Called after the update. Raises RunFailed for a dead unit. Collective; the same result on
        every rank, since gradients and adapters are."""
        if self.done or update.skipped or self._session.optimizer.learning_rate == 0:
            return
        adapters, world = self._session.method.adapters, self._session.world
        moving = [name for name in self._moving if name in adapters]
        moved = _any_nonzero([[adapters[name].B] for name in moving])
        still = [name for name, has_moved in zip(moving, moved, strict=True) if not has_moved]
        with world.all_or_none():
            if still:
                raise RunFailed(
                    f"{_listed(still)}: B is still exactly 0 after an update, though its gradient "
                    "is not: the optimizer does not train this adapter"
                )
            if not bool(torch.isfinite(self._session.masked_optimizer.values).all()):
                raise RunFailed("a trained value is not finite after one of the first updates")
        self._left -= 1
        if not self._waiting or self._left == 0:
            self.done = True
            self._judge()

    def _judge(self) -> None:
        """Refuse the units that had no gradient, unless nothing reaches them. Collective."""
        without = self._without_gradient()
        if not without:
            return
        called, readers = _how_they_are_used(self._session, without)
        unused = [name for name in without if name not in called and name not in readers]
        with self._session.world.all_or_none():
            for name in without:
                if name in readers:
                    raise RunFailed(
                        f"{_listed([n for n in without if n in readers])}: no gradient in the "
                        f"first steps: {readers[name]} reads the layer's weight itself instead of "
                        "calling the layer, so that its adapter has no effect; accepted: "
                        "method.targets without it"
                    )
                if name in called:
                    raise RunFailed(
                        f"{_listed([n for n in without if n in called])}: no gradient in the "
                        "first steps, though the layer is called: its adapter has no effect on the "
                        "loss; accepted: method.targets without it"
                    )
        if unused:
            self._recorder.log_line(
                f"note      adapters without effect: {_listed(unused)} were never called by these "
                "records; method.targets can leave them out"
            )

    def _without_gradient(self) -> list[str]:
        """Units without a gradient so far, other than experts beside others that have one."""
        session = self._session
        counted = session.method.adapters.layers
        units = {unit.name: unit for unit in session.method.units}
        alive = {_family(unit) for name, unit in units.items() if name not in self._waiting}
        return [
            name
            for name, unit in units.items()
            if name in self._waiting
            and counted[name].token_counter is None
            and not (_is_one_of_many(unit) and _family(unit) in alive)
        ]


def _any_nonzero(groups: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """For each group of tensors, whether any value is not 0."""
    flat = [(number, t) for number, group in enumerate(groups) for t in group if t is not None]
    found = [False] * len(groups)
    tensors = [t for _, t in flat if t.numel()]
    if not tensors:
        return found
    largest = torch.stack(torch._foreach_norm(tensors, math.inf)).tolist()
    for (number, _), value in zip([one for one in flat if one[1].numel()], largest, strict=True):
        found[number] |= value != 0  # NaN is not 0
    return found


def _family(unit: Unit) -> tuple[int | None, str]:
    """Units of one block that differ only by an index in their path, as experts do."""
    return unit.layer, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", unit.kind)


def _is_one_of_many(unit: Unit) -> bool:
    return _family(unit)[1] != unit.kind


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _how_they_are_used(session: Session, names: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """(units whose layers a forward pass calls, and for others the class of the module that reads
    their weight). Collective."""
    called: set[str] = set()
    readers: dict[str, str] = {}
    layers = {name: session.method.adapters.layers[name].layer for name in names}
    handles = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    batch = session.task.collate([[example] for example in examples(session)])
    try:
        with as_verified(session), _watched(layers, readers):
            session.task.loss(session.model, batch.to(session.world.device))
    finally:
        for handle in handles:
            handle.remove()
    return called, readers


_OWN = ("adapters", "trainer", "torch", "deepspeed")
"""Packages that may read a layer's weight: its operator, sharders."""


@contextmanager
def _watched(layers: Mapping[str, nn.Module], readers: dict[str, str]) -> Iterator[None]:
    """Context that notes which other modules read the layers' `weight`."""
    names = {id(layer): name for name, layer in layers.items()}
    classes = {id(layer): type(layer) for layer in layers.values()}

    def watching(cls: Any) -> type:
        def read(layer: Any, attribute: str) -> Any:
            if attribute == "weight":
                frame = sys._getframe(1)
                if frame.f_globals.get("__name__", "").partition(".")[0] not in _OWN:
                    owner = type(frame.f_locals.get("self", layer)).__name__
                    readers.setdefault(names[id(layer)], owner)
            return cls.__getattribute__(layer, attribute)

        return type(cls.__name__, (cls,), {"__getattribute__": read})

    try:
        for layer in layers.values():
            layer.__class__ = watching(classes[id(layer)])
        yield
    finally:
        for layer in layers.values():
            layer.__class__ = classes[id(layer)]
