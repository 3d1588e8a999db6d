"""Spectral initialisation: initial adapters from singular components of the matrices.

A decomposition is computed by the rank that reads the matrix and sent to all others, so that all
hold the same bits; it is cached on disk by a digest of the matrix.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from adapters import seeds
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.spectral import SpectralMethod
from adapters.spectral import Triplets, singular_triplets
from adapters.unit import Unit
from adapters.units import make_units
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.files import INITIAL
from trainer.loading.initial_adapters import (
    as_tensors,
    from_tensors,
    initial_adapter_of,
    save_tensors,
)
from trainer.model.backbone import BuiltModel

_VERSION = 2  # of the cached decompositions; raise it when their computation changes
_WORDS = 1024  # 32-bit words in a row of the fingerprint
_ROWS = 4096  # of them at a time, 32 MiB as 64-bit numbers


class SpectralInit:
    """Computes or loads each unit's initial adapter ΔW₀ and its residual W − ΔW₀.

    `method` computes them; one that is not spectral needs `stored`, which an earlier stage took out
    of W and which stay out."""

    def __init__(
        self,
        method: Method,
        world: World,
        cache: Path,
        stored: Mapping[str, InitialAdapter] | None = None,
    ):
        self.method, self.world, self.cache = method, world, cache
        self._stored = stored
        self.initial_adapters: dict[str, InitialAdapter] = {}
        self._new: dict[str, InitialAdapter] = {}

    @property
    def resumed(self) -> bool:
        """Whether the initial adapters come from the run's file."""
        return self._stored is not None

    def units(self, built: BuiltModel) -> Sequence[Unit]:
        """The matrices to split. Takes their initial adapters from the run's file, if there is one.
        Raises BadCheckpoint where one is absent or of another shape."""
        units = built.units
        if self._stored is None:
            return units
        if not isinstance(self.method, SpectralMethod):
            units = make_units(built.model, [n for n in self._stored if n in built.adapted_layers])
            if missing := self._stored.keys() - {unit.name for unit in units}:
                raise BadCheckpoint(
                    f"{min(missing)}: in {INITIAL}, but no matrix of this model takes adapters "
                    "there; accepted: the model and the method.include_head of that run"
                )
        self.initial_adapters |= {u.name: initial_adapter_of(self._stored, u) for u in units}
        return units

    def residual(self, unit: Unit, weight: Tensor) -> Tensor:
        """W − ΔW₀ (out, in), in float32 on W's device, of a unit's original matrix (out, in).
        Computes ΔW₀ unless it is known. Raises UserError where W cannot be decomposed."""
        if unit.name not in self.initial_adapters:
            self.initial_adapters[unit.name] = self._new[unit.name] = self._compute(unit, weight)
        adapter = self.initial_adapters[unit.name].adapter.copy().to(weight.device)
        return weight.float() - adapter.delta()

    def exchange(self) -> None:
        """All-gather the initial adapters computed since the last call. Collective."""
        for part in self.world.gather(as_tensors(self._new)):
            self.initial_adapters |= from_tensors(part)
        self._new = {}

    def _compute(self, unit: Unit, weight: Tensor) -> InitialAdapter:
        assert isinstance(self.method, SpectralMethod)
        ranges = self.method.ranges(unit)
        file = self.cache / f"{_key(weight, ranges)}.safetensors"
        held = _cached(file)
        if held is None:
            try:
                triplets = singular_triplets(weight, ranges)
            except ValueError as error:
                raise UserError(f"{unit.name}: {error}") from error
            held = {
                name: getattr(triplets, name).float().cpu().contiguous()
                for name in ("U", "S", "V", "spectrum")
            }
            if not file.parent.exists() or os.access(file.parent, os.W_OK):  # else another user's
                save_tensors(held, file, {"sha256": _checksum(held)})
        adapter = self.method.extract(unit, Triplets(**held)).requires_grad_(False)
        return InitialAdapter(adapter, held["spectrum"])


def _cached(file: Path) -> dict[str, Tensor] | None:
    """A cached decomposition; None where there is none, or not the one that was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            written = (opened.metadata() or {}).get("sha256")
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return held if written == _checksum(held) else None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(weight: Tensor, ranges: Sequence[range]) -> str:
    spans = [(r.start, r.stop) for r in ranges]
    digest = hashlib.sha256(_fingerprint(weight))
    digest.update(f"{_VERSION} {tuple(weight.shape)} {weight.dtype} {spans}".encode())
    return digest.hexdigest()


def _fingerprint(weight: Tensor) -> bytes:
    """Two hashes per row of 32-bit words x, Σ w_i x_i mod 2⁶⁴ with fixed random w, on W's device.

    SHA-256 of the matrix itself would take as long as a GPU takes to decompose it. Different
    rows collide with probability 2⁻⁶⁶, which suffices against accidents.
    """
    data = weight.detach().contiguous().flatten().view(torch.uint8)
    if len(data) % (4 * _WORDS):
        data = F.pad(data, (0, -len(data) % (4 * _WORDS)))
    low, high = -(2**63), 2**63 - 1
    factors = torch.randint(low, high, (_WORDS, 2), generator=seeds.generator(_VERSION))
    factors = factors.to(weight.device)
    sums = [
        torch.stack([(rows.long() * column).sum(1) for column in factors.unbind(1)])
        for rows in data.view(torch.int32).view(-1, _WORDS).split(_ROWS)
    ]
    return torch.cat(sums, 1).cpu().numpy().tobytes()
