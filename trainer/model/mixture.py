"""What a mixture of experts has that other models have not: stacks, routers, gates."""

import torch
from torch import nn

from adapters.layers.experts import AdaptedExperts, StackedLinear
from adapters.units import transformer_blocks
from trainer.errors import UserError

_ROW_BYTES = 16
"""A row of an operand of torch's grouped product takes a multiple of so many."""


def check_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises UserError where a token's experts are more than there are, or the grouped product
    (torch's) cannot take their rows."""
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
    """Stacked parameters of the blocks that belong to no adapted layer."""
    return sorted({
        name
        for _, block in transformer_blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3
        and not isinstance(block.get_submodule(name.rpartition(".")[0]), StackedLinear)
    })  # fmt: skip


def gates(model: nn.Module) -> list[tuple[str, int, int]]:
    """(path, rows, experts) of what is beside a mixture's experts with a row of weights for each of
    them, or one for a shared expert: too few for an adapter, and too delicate to quantise."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedExperts):
            block, experts = path.rpartition(".")[0], module.gate_up_proj.experts
            for name, child in model.get_submodule(block).named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.shape[0] in (1, experts):
                    found.append((f"{block}.{name}", weight.shape[0], experts))
    return found


def routers(model: nn.Module) -> list[str]:
    """Paths of what chooses the experts: the module beside them with one row of weights each."""
    found = [path for path, rows, experts in gates(model) if rows == experts]
    if not found:
        raise UserError(
            f"method.train_router: true given, but {type(model).__name__} has no experts of a "
            "known form; accepted: false"
        )
    return found
