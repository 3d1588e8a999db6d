"""Merge adapters into a model's tensors, in the layout of its pretrained files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.factors import Part, merged
from adapters.gated import GatedAdapter
from adapters.layers.base import PackedLayer
from adapters.unit import stem
from trainer.errors import UserError
from trainer.loading.key_mapping import Converted, KeyMapping
from trainer.loading.safetensors_files import PretrainedFiles
from trainer.loading.source import names_of_parameters
from trainer.model.backbone import BuiltModel
from trainer.model.matrices import shared_matrices

_SHARD_BYTES = 4 * 2**30


class Merger:
    """Reads a model tensor by tensor and merges adapters, trained heads and `rows` of tokens.

    `backbone`: built, but not loaded. `parts`: what was learned, by unit. `initial`: what spectral
    initialisation took out of W.
    `dequantised`: W quantised and dequantised, as in training; else W of the files.
    """

    def __init__(
        self,
        backbone: BuiltModel,
        folder: Path,
        parts: Mapping[str, Sequence[Part]],
        initial: Mapping[str, GatedAdapter],
        heads: Mapping[str, Mapping[str, Tensor]],
        rows: Mapping[str, Tensor],
        magnitudes: Mapping[str, Tensor],
        *,
        dequantised: bool,
        device: torch.device,
    ):
        self.model, self.dtype, self.device = backbone.model, backbone.dtype, device
        self._backbone, self._rows, self._magnitudes = backbone, rows, magnitudes
        self._parts, self._initial, self._dequantised = parts, initial, dequantised
        self._trained = {
            f"{path}.{name}": tensor
            for path, head in heads.items()
            for name, tensor in head.items()
        }
        self._prefix = self.model.base_model_prefix
        self._files = PretrainedFiles(folder, KeyMapping(self.model, backbone.tensors))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value on the CPU) of every tensor of the merged model's files."""
        backbone, names_of = self._backbone, names_of_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            path, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(path)
            if name in self._trained:
                yield self._published(name), self._trained[name].to(self.dtype)
            elif isinstance(owner, PackedLayer) and owner.stacked:
                yield from self._stack(path, owner)
            else:
                matrix = owner if isinstance(owner, PackedLayer) and attribute == "weight" else None
                shape = tuple(parameter.shape) if matrix is None else matrix.stored_shape
                names = names_of[id(parameter)]
                table = next((t for t in backbone.tables if f"{t}.weight" in names), None)
                if table is not None and backbone.added is not None:
                    shape = (backbone.added.stored, *shape[1:])
                key = self._files.check(names, shape)
                name = next(known for known in names if self._files.find(known) is not None)
                value = self._files.read(key).to(self.device, self.dtype)
                if matrix is not None:
                    full = matrix.reoriented(value).unsqueeze(0)
                    value = matrix.reoriented(self._final(matrix, [path], full)[0])
                if table is not None and backbone.added is not None:
                    value = backbone.added.filled(value)
                    if table in self._rows:
                        value[list(backbone.added.ids)] = self._rows[table].to(value)
                yield self._published(name), value.cpu().contiguous()
        for name, _ in self.model.named_buffers():
            stored = self._files.find(name)
            if stored is not None:  # computed buffers are not in the files
                yield self._published(name), self._files.read(stored).contiguous()

    def _stack(self, path: str, stack: PackedLayer) -> Iterator[tuple[str, Tensor]]:
        """A stack of experts, as one tensor or expert by expert, as in the files."""
        numbers = range(len(stack.adapted_layers))
        shape, turned = stack.stored_shape, stack.transposed
        read = (self._files.read_expert(path, e, shape, transposed=turned) for e in numbers)
        value = torch.stack([
            stack.reoriented(matrix.to(self.device, self.dtype)) for matrix in read
        ])  # fmt: skip
        value = self._final(stack, stack.layer_names(path), value)
        value = stack.reoriented(value).cpu()
        keys = [self._files.check_expert(path, e, shape, transposed=turned) for e in numbers]
        if keys[0] == keys[-1]:  # a single tensor in the files
            yield self._published(path), value
            return
        for parts, matrix in zip(keys, value, strict=True):
            for key, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield self._prefixed(path, str(key)), rows.contiguous()

    def _final(self, layer: PackedLayer, units: Sequence[str], value: Tensor) -> Tensor:
        """W + Σ (ΔW − ΔW₀) (units, out, in)."""
        if self._dequantised:
            value = _as_trained(layer, value, [self._initial.get(unit) for unit in units])
        for index, unit in enumerate(units):
            m = self._magnitudes.get(unit)
            value[index] = merged(value[index], self._parts.get(unit, ()), m)
        return value

    def _published(self, name: str) -> str:
        """The parameter's key in the merged files: as in the pretrained ones, but with the prefix
        that files of a bare base model lack. Raises UserError where the files hold it in another
        form, which transformers would convert again."""
        key = self._files.find(name)
        if isinstance(key, Converted):
            if name in key.conversion.keys:
                raise UserError(
                    f"export: {name} is stored in another form ({key.conversion.operations} of "
                    "transformers), so it cannot be merged; accepted: export the adapter alone"
                )
            return name
        return name if key is None else self._prefixed(name, key)

    def _prefixed(self, name: str, key: str) -> str:
        """`key` with the prefix of `name` where it comes from a bare base model's files."""
        start = f"{self._prefix}."
        below = name.removeprefix(start)
        bare = below != name and below.partition(".")[0] == key.partition(".")[0]
        return start + key if bare else key


def _as_trained(
    layer: PackedLayer, weight: Tensor, initial: Sequence[GatedAdapter | None]
) -> Tensor:
    """W (matrices, out, in) as trained on: W − ΔW₀ quantised and dequantised, plus ΔW₀."""
    dtype = weight.dtype
    deltas = [0 if s is None else s.copy().to(weight.device).delta() for s in initial]
    residual = torch.stack([(w.float() - t).to(dtype) for w, t in zip(weight, deltas, strict=True)])
    packed = layer.pack(residual, dtype)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    residual = layer.dequantised(dtype).view_as(weight)
    layer.weight = nn.Parameter(residual.to("meta"), requires_grad=False)
    return torch.stack([(w.float() + t).to(dtype) for w, t in zip(residual, deltas, strict=True)])


def write_shards(parameters: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """Write safetensors files of at most 4 GiB, with transformers' index."""
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, value in parameters:
        nbytes = value.numel() * value.element_size()
        if shard and size + nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shard[name], size, total = value, size + nbytes, total + nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def refuse_tied_targets(backbone: BuiltModel, adapted: Iterable[str]) -> None:
    """Raises UserError where an adapted layer shares W with another module: the merge would change
    that too."""
    shared = shared_matrices(backbone.model)
    for path in map(stem, adapted):
        if path in shared:
            raise UserError(
                f"{path} shares its matrix with {shared[path]}, so its adapter cannot be merged; "
                "accepted: export the adapter alone"
            )
