"""The file of a run's initial adapters, for methods with spectral initialisation.

A run writes `initial.safetensors` and its SHA-256 once and then always loads it: recomputed signs
and vectors of clustered singular values would differ.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from adapters.unit import Unit
from trainer.errors import BadCheckpoint, UserError, refuse_mismatch
from trainer.files import INITIAL, replacing, sha256


def save_initial_adapters(initial_adapters: Mapping[str, InitialAdapter], folder: Path) -> str:
    """Write a run's initial adapters and a file with their SHA-256. Returns it."""
    tensors = {}
    for name, initial in initial_adapters.items():
        adapter = initial.adapter
        for role, tensor in (("A", adapter.A), ("g", adapter.g), ("B", adapter.B)):
            tensors[f"{name}/{role}"] = tensor.detach().cpu().contiguous()
        tensors[f"{name}/spectrum"] = initial.spectrum.contiguous()
    save_tensors(tensors, folder / INITIAL)
    digest = sha256(folder / INITIAL)
    (folder / INITIAL).with_suffix(".sha256").write_text(f"{digest}  {INITIAL}\n")
    return digest


def load_initial_adapters(file: Path, digest: str) -> dict[str, InitialAdapter]:
    """A run's initial adapters by unit. Raises BadCheckpoint where the file is missing, or its
    SHA-256 is not `digest`, the checkpoint's."""
    if not file.is_file():
        raise BadCheckpoint(
            f"{file} is missing: the initial tensors that the run's checkpoints build on"
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise BadCheckpoint(f"{file}: checksum differs from the one written: damaged")
    parts: dict[str, dict[str, Tensor]] = {}
    with refuse_mismatch(file):
        for key, tensor in load(content).items():
            name, _, role = key.rpartition("/")
            parts.setdefault(name, {})[role] = tensor
        return {
            name: InitialAdapter(
                GatedAdapter(p["A"], p["g"], p["B"]).requires_grad_(False), p["spectrum"]
            )
            for name, p in parts.items()
        }


def initial_adapter_of(stored: Mapping[str, InitialAdapter], unit: Unit) -> InitialAdapter:
    """The initial adapter of `unit`. Raises BadCheckpoint where it is absent or misshapen."""
    initial = stored.get(unit.name)
    shape = None if initial is None else (initial.adapter.B.shape[1], initial.adapter.A.shape[1])
    if initial is None or shape != (unit.out_features, unit.in_features):
        raise BadCheckpoint(
            f"{unit.name}: {shape or 'nothing'} in {INITIAL}, which was made on another backbone; "
            "accepted: a checkpoint of this one"
        )
    return initial


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Replace a safetensors file atomically, also with concurrent writers. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as partial:
            save_file(dict(tensors), partial)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be written ({error.strerror})") from error
