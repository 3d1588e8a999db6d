"""Data-driven starts: passes over the run's first batches, in which every matrix sums a sketch.

The passes are forward and backward passes of the run's model as it is loaded, sharded and packed;
nothing is updated. Ranks run their own micro-batches and add up their sums. The decompositions are
divided over the ranks and exchanged, so that all hold the same bits (`adapters/starts.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adapters import seeds
from adapters.layers.sketch import Side, Sketch
from adapters.starts import (
    Start,
    centred,
    explained,
    gains,
    orthonormal,
    right_vectors,
    sketch_size,
)
from adapters.unit import Unit
from trainer.data.loader import Step
from trainer.errors import UserError
from trainer.memory.planner import oom_error
from trainer.session import Session
from trainer.training.loop import make_loader

_SEED = 7_410
"""Beside the run's seed, of P₁: an arbitrary number."""


def find_starts(session: Session) -> dict[str, Start]:
    """The start of every unit, by `method.start` and `method.start_options`. Collective; the same
    bits on every rank. Raises UserError for a unit that saw too few tokens."""
    loader = make_loader(session, session.world)  # its own: the run's order is not disturbed
    options = session.config.method
    steps = [loader.next_step() for _ in range(options.start_options.batches)]
    search = _Search(session, steps)
    return search.activations() if options.start == "activation" else search.gradients()


class _Search:
    """Subspace iteration of all units at once."""

    def __init__(self, session: Session, steps: Sequence[Step]):
        self._session, self._steps = session, steps
        self._units = session.method.units
        self._options = session.config.method.start_options
        self._components: int = session.config.method.start_components

    def activations(self) -> dict[str, Start]:
        """From Σ (x − x̄)(x − x̄)ᵀ, or Σ x xᵀ without `center`."""
        tests = self._gaussian(lambda unit: (unit.in_features,))
        for turn in range(self._options.passes):
            sketches = self._sketched(tests, "input", "input")
            sums = {
                name: centred(sketch) if self._options.center else sketch.sums
                for name, sketch in sketches.items()
            }
            if turn < self._options.passes - 1:
                tests = {name: orthonormal(rows) for name, rows in sums.items()}
        shares = {
            name: (A, explained(values, sketches[name], center=self._options.center))
            for name, (A, values) in self._decomposed(sums).items()
        }
        return self._measured(shares)

    def gradients(self) -> dict[str, Start]:
        """From Σ dy xᵀ."""
        tests = self._gaussian(lambda unit: (unit.in_features, unit.out_features))
        for turn in range(self._options.passes):
            left: Side = "input" if turn % 2 == 0 else "gradient"
            right: Side = "gradient" if turn % 2 == 0 else "input"
            sketches = self._sketched(tests, left, right)
            sums = {name: sketch.sums for name, sketch in sketches.items()}
            if turn < self._options.passes - 1:
                tests = {name: orthonormal(rows) for name, rows in sums.items()}
        return self._measured(self._decomposed(sums))

    def _gaussian(self, sides: Callable[[Unit], tuple[int, ...]]) -> dict[str, Tensor]:
        """P₁ (k, in) of every unit; one for all units with the same sides."""
        drawn: dict[tuple[int, ...], Tensor] = {}
        for unit in self._units:
            key = sides(unit)
            if key not in drawn:
                rows = sketch_size(self._components, *key)
                generator = seeds.generator(self._session.config.run.seed, _SEED, *key)
                gaussian = torch.randn(rows, unit.in_features, generator=generator)
                drawn[key] = orthonormal(gaussian).to(self._session.world.device)
        return {unit.name: drawn[sides(unit)] for unit in self._units}

    def _sketched(self, tests: Mapping[str, Tensor], left: Side, right: Side) -> dict[str, Sketch]:
        """Sketches of all units after a pass over the batches, summed over ranks."""
        session, layers = self._session, self._session.method.adapters.layers
        sketches = {
            unit.name: Sketch(
                tests[unit.name], left, right, unit.in_features,
                unit.in_features if right == "input" else unit.out_features,
            )
            for unit in self._units
        }  # fmt: skip
        try:
            for name, sketch in sketches.items():
                layers[name].sketch = sketch
            self._pass()
        finally:
            for name in sketches:
                layers[name].sketch = None
        for sketch in sketches.values():
            for tensor in sketch.tensors:
                session.world.sum_(tensor)
        self._check(sketches)
        return sketches

    def _pass(self) -> None:
        """Forward and backward of all batches, without dropout."""
        session = self._session
        with _without_updates(session):
            for step in self._steps:
                for index, batch in step.micro_batches:
                    session.watchdog.alive(f"micro-batch {index} of method.start")
                    try:
                        with session.casts.fresh():
                            loss, _ = session.task.loss(
                                session.model, batch.to(session.world.device)
                            )
                            session.engine.backward(loss / step.weight)
                    except torch.OutOfMemoryError as error:
                        raise oom_error(session) from error

    def _check(self, sketches: Mapping[str, Sketch]) -> None:
        """Raises UserError for a unit with fewer tokens than components, or infinite sums."""
        counts = torch.stack([sketch.count for sketch in sketches.values()]).tolist()
        finite = torch.stack([sketch.sums.isfinite().all() for sketch in sketches.values()])
        for name, count, is_finite in zip(sketches, counts, finite.tolist(), strict=True):
            if count <= self._components:
                raise UserError(
                    f"method.start_options.batches: {self._options.batches} given, in which "
                    f"{int(count)} tokens that reach the loss come through {name}; accepted: more, "
                    f"until every matrix sees more than {self._components}, or method.targets "
                    "without it"
                )
            if not is_finite:
                raise UserError(
                    f"method.start: {name} has inputs or gradients that are not finite; accepted: "
                    "lora, or a model.dtype in which they are"
                )

    def _decomposed(self, sums: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, singular values) of every unit, each computed by one rank. Collective."""
        world = self._session.world
        own = {
            unit.name: tuple(
                tensor.cpu() for tensor in right_vectors(sums[unit.name], self._components)
            )
            for unit in self._units[world.rank :: world.size]
        }
        found = {name: pair for part in world.gather(own) for name, pair in part.items()}
        return {unit.name: found[unit.name] for unit in self._units}

    def _measured(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Start]:
        """The starts, with the size of their components' outputs."""
        world = self._session.world
        tests = {name: A.to(world.device) for name, (A, _) in found.items()}
        sketches = self._sketched(tests, "input", "input")
        figures = world.broadcast(  # so that they are the same to the last bit
            {name: (worth, gains(sketches[name]).cpu()) for name, (_, worth) in found.items()}
        )
        return {name: Start(A, *figures[name]) for name, (A, _) in found.items()}


@contextmanager
def _without_updates(session: Session) -> Iterator[None]:
    """Context of passes in evaluation mode that recompute activations, where the run plans them,
    and leave no gradients."""
    model, blocks = session.model, session.backbone.blocks
    was_training = model.training
    model.eval()
    if session.config.engine.activation_checkpointing == "auto" and (
        session.world.device.type == "cuda"
    ):
        blocks.keep(0)  # the plan comes later
    try:
        yield
    finally:
        model.train(was_training)
        session.optimizer.zero_grad()
