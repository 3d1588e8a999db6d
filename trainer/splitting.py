"""Taking a method's part out of the matrices, for methods that start from singular components.

Decompositions are dealt out to the ranks and exchanged, so that every rank holds the same bits;
they are cached on disk by the matrix's own digest. A run writes what it started from once
(`initial.safetensors`, with its SHA-256 beside it) and always loads that again: signs and vectors
of clustered singular values would differ if they were computed anew.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.method import Method, Start
from adapters.spectral import Triplets, singular_triplets
from adapters.units import Unit
from trainer.checkpoint_files import BadCheckpoint, fitting
from trainer.distributed import World
from trainer.errors import UserError

INITIAL = "initial.safetensors"
_VERSION = 1  # of the cached decompositions; raise it when their computation changes


class Splitter:
    """What each unit starts with, and what is then left of its matrix."""

    def __init__(
        self, method: Method, world: World, cache: Path, stored: Mapping[str, Start] | None = None
    ):
        self.method, self.world, self.cache = method, world, cache
        self._stored = stored
        self.starts: dict[str, Start] = {}

    def prepare(self, units: Sequence[Unit], read: Callable[[Unit], Tensor]) -> None:
        """Compute (or take from the run's file) the start of `units`; all ranks call it together.

        `read` gives a unit's original matrix (out, in) on the device.
        """
        if self._stored is not None:
            self.starts |= {unit.name: _fitting(self._stored, unit) for unit in units}
            return
        own: dict[str, Start] = {}
        with self.world.together():
            for unit in list(units)[self.world.rank :: self.world.size]:
                own[unit.name] = self._compute(unit, read(unit))
        for part in self.world.gather(own):
            self.starts |= part

    def residual(self, name: str, weight: Tensor) -> Tensor:
        """W − ΔW₀ (out, in), in float32 on W's device."""
        return weight.float() - self.starts[name].adapter.delta().to(weight.device)

    def _compute(self, unit: Unit, weight: Tensor) -> Start:
        ranges = self.method.ranges(unit)
        file = self.cache / f"{_key(weight, ranges)}.safetensors"
        try:
            held = load_file(file)
        except (OSError, SafetensorError):
            try:
                triplets = singular_triplets(weight, ranges)
            except ValueError as error:
                raise UserError(f"{unit.name}: {error}") from error
            held = {
                name: getattr(triplets, name).float().cpu().contiguous()
                for name in ("U", "S", "V", "spectrum")
            }
            _save(held, file)
        adapter = self.method.extract(unit, Triplets(**held)).requires_grad_(False)
        return Start(adapter, held["spectrum"])


def save_starts(starts: Mapping[str, Start], folder: Path) -> str:
    """Write a run's initial tensors, and beside them their SHA-256, which is returned."""
    tensors = {}
    for name, start in starts.items():
        adapter = start.adapter
        for role, tensor in (("A", adapter.A), ("g", adapter.g), ("B", adapter.B)):
            tensors[f"{name}/{role}"] = tensor.detach().cpu().contiguous()
        tensors[f"{name}/spectrum"] = start.spectrum.contiguous()
    _save(tensors, folder / INITIAL)
    digest = _digest(folder / INITIAL)
    (folder / INITIAL).with_suffix(".sha256").write_text(f"{digest}  {INITIAL}\n")
    return digest


def load_starts(file: Path, digest: str) -> dict[str, Start]:
    """A run's initial tensors, once their SHA-256 is the one that the checkpoint names."""
    if not file.is_file():
        raise BadCheckpoint(
            f"{file} is missing: the initial tensors that the run's checkpoints build on"
        )
    if _digest(file) != digest:
        raise BadCheckpoint(f"{file}: checksum differs from the one written: damaged")
    parts: dict[str, dict[str, Tensor]] = {}
    with fitting(file):
        for key, tensor in load_file(file).items():
            name, _, role = key.rpartition("/")
            parts.setdefault(name, {})[role] = tensor
        return {
            name: Start(GatedAdapter(p["A"], p["g"], p["B"]).requires_grad_(False), p["spectrum"])
            for name, p in parts.items()
        }


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fitting(stored: Mapping[str, Start], unit: Unit) -> Start:
    start = stored.get(unit.name)
    shape = None if start is None else (start.adapter.B.shape[1], start.adapter.A.shape[1])
    if start is None or shape != (unit.out_features, unit.in_features):
        raise BadCheckpoint(
            f"{unit.name}: {shape or 'nothing'} in {INITIAL}, which was made on another backbone; "
            "accepted: a checkpoint of this one"
        )
    return start


def _key(weight: Tensor, ranges: Sequence[range]) -> str:
    data = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(data.data)
    spans = [(r.start, r.stop) for r in ranges]
    digest.update(f"{_VERSION} {tuple(weight.shape)} {weight.dtype} {spans}".encode())
    return digest.hexdigest()


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write under another name, then rename: whoever reads it sees all of it or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as made:
            partial = Path(made.name)
        try:
            save_file(dict(tensors), partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be written ({error.strerror})") from error
