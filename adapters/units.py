"""Select the matrices of a backbone that get adapters, and identify them as units."""

import copy
import difflib
import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from adapters.layers.base import AdaptedLayer, PackedLayer
from adapters.unit import Unit, stem


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every transformer block, in execution order.

    A block is an element of an outermost `ModuleList` that holds linear layers: `model.layers.3`,
    `bert.encoder.layer.0`; where its elements are lists again, one of theirs
    (`funnel.encoder.blocks.1.0`). Lists inside a block (experts) are part of it.
    """
    blocks: list[tuple[str, nn.Module]] = []
    lists: list[str] = []
    for path, module in model.named_modules():
        outermost = not any(path.startswith(f"{outer}.") for outer in lists)
        if outermost and isinstance(module, nn.ModuleList) and _has_linear(module):
            lists.append(path)
            blocks += _elements(path, module)
    return blocks


def _elements(path: str, modules: nn.Module) -> list[tuple[str, nn.Module]]:
    """The elements of a list, or of the lists in it, which have no forward."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in modules.named_children():
        inner = isinstance(module, nn.ModuleList)
        found += _elements(f"{path}.{name}", module) if inner else [(f"{path}.{name}", module)]
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether an `nn.Linear` computes exactly x Wᵀ + b from its parameters: some routers subclass
    nn.Linear and do more, and `torch.nn.utils` computes a weight from others."""
    if not isinstance(module, nn.Linear) or set(module._parameters) != {"weight", "bias"}:
        return False
    if module._forward_pre_hooks or module._forward_hooks or len(module._modules):
        return False
    return type(module).forward is nn.Linear.forward or _computes_product(module)


@torch.no_grad()
def _computes_product(module: nn.Linear) -> bool:
    """Whether a forward of its own (Falcon's) gives x Wᵀ + b: tried on a small matrix, in training
    and evaluation."""
    probe = copy.copy(module)
    weight = torch.arange(15.0, device="cpu").sin().view(5, 3)
    bias = None if module.bias is None else torch.arange(5.0, device="cpu").cos()
    probe._parameters = {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    probe.in_features, probe.out_features = 3, 5
    x = torch.arange(24.0, device="cpu").cos().view(2, 4, 3)
    expected = F.linear(x, weight, bias)
    try:
        found = [probe.train(mode)(x) for mode in (True, False)]
        return all(y.shape == expected.shape and torch.allclose(y, expected) for y in found)
    except Exception:  # it expects another shape, or gives several values
        return False


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D` (GPT-2): x W + b with W (in, out)."""
    from transformers.pytorch_utils import Conv1D  # not at the top: it takes seconds

    return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward


def linear_names(model: nn.Module, heads: Sequence[str] = ()) -> list[str]:
    """Names of all linear layers, one per expert in a stack, except those at or below a path in
    `heads`."""
    names = []
    for path, module in model.named_modules():
        if any(path == head or path.startswith(head + ".") for head in heads):
            continue
        if isinstance(module, PackedLayer):
            names += module.layer_names(path)
        elif is_linear(module):
            names.append(path)
    return names


def layer_at(model: nn.Module, name: str) -> nn.Linear | AdaptedLayer:
    """The linear layer, or the expert's layer in a stack, of a name from `linear_names`."""
    parent, _, last = name.rpartition(".")
    stack = model.get_submodule(parent)
    if isinstance(stack, PackedLayer):
        return stack.adapted_layers[int(last)]
    layer = model.get_submodule(name)
    if isinstance(layer, PackedLayer):
        return layer.adapted_layers[None]
    assert isinstance(layer, nn.Linear)
    return layer


def expert_counts(model: nn.Module) -> dict[str, int]:
    """Number of experts of every stack, by path."""
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, PackedLayer))
    return {path: len(layer.adapted_layers) for path, layer in layers if layer.stacked}


def fan_in_fan_out(layers: Iterable[AdaptedLayer]) -> bool:
    """PEFT's key of this name: whether adapted modules hold (in, out), as `Conv1D` does. It is one
    key for all; where modules differ, PEFT corrects it for each."""
    return any(layer.layer.transposed and not layer.layer.stacked for layer in layers)


def select_targets(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names that match `targets`: `all-linear`, a regular expression, or a list of suffixes.

    As in PEFT a string must match the full path, and a list entry its last dotted components. An
    expert's matrix also matches by its stack's name. Raises ValueError naming an entry that matches
    nothing.
    """
    if targets == "all-linear":
        return list(names)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"method.targets: {targets!r} is not a regular expression ({error}); accepted: "
                "all-linear, a regular expression for the whole path, a list of suffixes"
            ) from error
        chosen = [n for n in names if pattern.fullmatch(n) or pattern.fullmatch(stem(n))]
        if not chosen:
            raise ValueError(_nothing_matches(targets, names))
        return chosen
    for suffix in targets:
        if not any(_ends_with(name, suffix) for name in names):
            raise ValueError(_nothing_matches(suffix, names))
    return [name for name in names if any(_ends_with(name, suffix) for suffix in targets)]


def make_units(model: nn.Module, names: Sequence[str]) -> list[Unit]:
    """One unit for each linear layer in `names`, in that order."""
    blocks = transformer_blocks(model)
    layer_of = {path: layer for layer, (path, _) in enumerate(blocks)}
    units = []
    for index, name in enumerate(names):
        block = next((path for path in layer_of if name.startswith(path + ".")), None)
        layer = layer_at(model, name)
        units.append(
            Unit(
                index=index,
                name=name,
                layer=None if block is None else layer_of[block],
                kind=stem(name if block is None else name[len(block) + 1 :]),
                out_features=layer.out_features,
                in_features=layer.in_features,
            )
        )
    return units


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | PackedLayer) for child in module.modules())


def _ends_with(name: str, suffix: str) -> bool:
    return any(n == suffix or n.endswith("." + suffix) for n in (name, stem(name)))


def _nothing_matches(target: str, names: Sequence[str]) -> str:
    known = sorted({stem(name).rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"method.targets: {target!r} matches no linear layer of this model; "
        f"accepted: all-linear, {', '.join(known)}{hint}"
    )
