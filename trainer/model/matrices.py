"""Replace a model's linear layers by adapted layers with their weight formats."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from adapters.layers.base import AdaptedLayer, PackedLayer
from adapters.layers.expert_modules import AdaptedExperts
from adapters.layers.handles import RegisteredLayer
from adapters.layers.linear import AdaptedLinear
from adapters.methods.options import MethodOptions
from adapters.unit import stem
from adapters.units import layer_at, linear_names, transformer_blocks
from trainer.errors import UserError
from trainer.model.backbone import set_module


def install_adapted_layers(
    model: nn.Module,
    quantization: str,
    targets: list[str],
    unquantized: list[str],
    read: Collection[str] = (),
) -> dict[str, AdaptedLayer]:
    """Replace linear layers, also those without adapters: only an adapted layer keeps its matrix
    out of the tensors that a compiled block saves for backward. Returns them by path. Layers in
    `read`, whose weight the model reads itself, stay as they are. Raises UserError where a matrix
    cannot be quantised."""
    adapted_layers: dict[str, AdaptedLayer] = {}
    quantizable = dict.fromkeys(linear_names(model, [*unquantized, *read]))
    for path in dict.fromkeys([*quantizable, *targets]):
        layer = layer_at(model, path)
        weight_format = quantization if path in quantizable else "none"
        if isinstance(layer, nn.Linear):
            adapted = AdaptedLinear(layer, weight_format)
            set_module(model, path, adapted)
            adapted_layers[path] = adapted
        else:  # a packed layer already: an expert in a stack, a `Conv1D`
            layer.layer.weight_format = weight_format
            adapted_layers[path] = layer
    if quantization != "none":
        _refuse_half_quantised(model, quantization)
        _refuse_other_matrices(model, quantization, [*unquantized, *read])
    return adapted_layers


def other_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Large matrices in the blocks that belong to no adapted layer."""
    for path, block in transformer_blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Embedding | RegisteredLayer):
                continue
            if isinstance(module, AdaptedExperts):  # biases per expert
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and parameter.numel() > 1 << 20:
                    yield ".".join(part for part in (path, name, attribute) if part), parameter


def _refuse_other_matrices(model: nn.Module, quantization: str, unquantized: Sequence[str]) -> None:
    """Raises UserError rather than leave some matrices of the blocks unquantised, other than those
    of `unquantized` modules."""
    for where, parameter in other_matrices(model):
        if where.rpartition(".")[0] not in unquantized:
            raise UserError(
                f"model.quantization: {quantization!r} given, but {where} "
                f"{tuple(parameter.shape)} is no matrix of a linear layer that the model calls and "
                "would stay unquantised; accepted for this model: none"
            )


def _refuse_half_quantised(model: nn.Module, quantization: str) -> None:
    """Raises UserError for a matrix that is quantised in one of the modules that share it only."""
    formats: dict[int, dict[str, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                packs = isinstance(module, PackedLayer) and name == "weight"
                weight_format = module.weight_format if packs else "none"
                formats.setdefault(id(parameter), {}).setdefault(weight_format, path)
    for owners in formats.values():
        if len(owners) > 1:
            raise UserError(
                f"model.quantization: {quantization!r} given, but {owners[quantization]} shares "
                f"its matrix with {owners['none']}, which stays unquantised; accepted for this "
                "model: none"
            )


def shared_matrices(model: nn.Module) -> dict[str, str]:
    """The modules whose matrix is another's too, by path, and the path of one such other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        if attribute == "weight" and path not in owners.setdefault(id(parameter), []):
            owners[id(parameter)].append(path)
    return {
        path: next(other for other in paths if other != path)
        for paths in owners.values()
        for path in paths
        if len(paths) > 1
    }


def refuse_shared_blocks(model: nn.Module, method: MethodOptions) -> None:
    """Raises UserError for a parameter of several blocks: a sharder gives each its own copy."""
    owner: dict[int, str] = {}
    for path, block in transformer_blocks(model):
        for name, parameter in block.named_parameters():
            first = owner.setdefault(id(parameter), path)
            if first != path:
                raise UserError(
                    f"method.kind: {method.kind} given, but {path}.{name} is also a parameter of "
                    f"{first}; accepted for this model: methods that leave the backbone frozen"
                )


def refuse_tied(model: nn.Module, method: MethodOptions, targets: list[str]) -> None:
    """Raises UserError for tied matrices: spectral initialisation would change both modules."""
    shared = shared_matrices(model)
    for path in targets:
        if stem(path) in shared:
            raise UserError(
                f"method.targets: {path} shares its matrix with another module, and "
                f"method.kind={method.kind} takes a part of it out; accepted: matrices of their own"
            )
