"""Mixtures of experts: checks of their stacks, and their routers and gates."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from adapters.layers.expert_modules import AdaptedExperts
from adapters.layers.experts import StackedLinear
from adapters.units import transformer_blocks
from trainer.errors import UserError
from trainer.model.matrices import other_matrices

_ROW_BYTES = 16
"""Rows of the operands of torch's grouped GEMM are multiples of this."""


def check_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises UserError where a token's experts exceed their number, or torch's grouped GEMM does
    not support their shapes."""
    chosen = getattr(model.config, "num_experts_per_tok", None)
    for path, stack in model.named_modules():
        if not isinstance(stack, StackedLinear):
            continue
        experts, *widths = stack.shape
        if isinstance(chosen, int) and not 1 <= chosen <= experts:
            raise UserError(
                f"model.id, model.overrides: num_experts_per_tok: {chosen} given; accepted: at "
                f"least one, and no more than the {experts} of {path}"
            )
        if any(width * dtype.itemsize % _ROW_BYTES for width in widths):
            raise UserError(
                f"model.id: {path}: experts of {widths[0]} x {widths[1]}; accepted in {dtype}: "
                f"multiples of {_ROW_BYTES // dtype.itemsize}"
            )


def left_alone(model: nn.Module) -> list[str]:
    """Stacked parameters of the blocks, and other large matrices, that belong to no linear or
    adapted layer; routers aside."""
    beside_experts = {path for path, _, _ in gates(model)}
    large = {
        name
        for name, _ in other_matrices(model)
        if (path := name.rpartition(".")[0]) not in beside_experts
        and not isinstance(model.get_submodule(path), nn.Linear)
    }
    found = set()
    for path, block in transformer_blocks(model):
        for name, parameter in block.named_parameters():
            owner = block.get_submodule(name.rpartition(".")[0])
            stacked = parameter.dim() == 3 and not isinstance(owner, StackedLinear | _ConvNd)
            if stacked or f"{path}.{name}" in large:
                found.add(name)
    return sorted(found)


def gates(model: nn.Module) -> list[tuple[str, int, int]]:
    """(path, rows, experts) of modules next to a mixture's experts with one row of weights per
    expert, or one row for a shared expert: too small for an adapter, too sensitive to quantise."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedExperts):
            block, experts = path.rpartition(".")[0], module.experts
            for name, child in model.get_submodule(block).named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.shape[0] in (1, experts):
                    found.append((f"{block}.{name}", weight.shape[0], experts))
    return found


def routers(model: nn.Module) -> list[str]:
    """Paths of the routers: gates with one row per expert. Raises UserError without any."""
    found = [path for path, rows, experts in gates(model) if rows == experts]
    if not found:
        raise UserError(
            f"method.train_router: true given, but {type(model).__name__} has no experts of a "
            "known form; accepted: false"
        )
    return found
