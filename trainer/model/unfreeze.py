"""Which parameters of a backbone train, where any do."""

from collections.abc import Iterator, Mapping

from torch import nn

from adapters.methods.baseline_options import FullOptions
from trainer.errors import UserError


def unfreeze(model: nn.Module, method: FullOptions, heads: Mapping[str, nn.Module]) -> None:
    """Make what the method selects train, and the new `heads`. Raises UserError where it selects
    nothing."""
    found = False
    for _, parameter in _selected(model, method):
        parameter.requires_grad_(True)
        found = True
    if not found:
        raise UserError(
            f"method.kind: {method.kind} given, but {type(model).__name__} here has nothing that "
            f"it trains ({method.selected}); accepted for this model: another method"
        )
    for head in heads.values():
        head.requires_grad_(True)


def refuse_fixed(model: nn.Module, method: FullOptions) -> None:
    """Raises UserError for a selected parameter that cannot train as the model means it: one that
    the model keeps fixed (tables of sines), which would train, or a single number."""
    for name, parameter in _selected(model, method):
        if not parameter.requires_grad or parameter.dim() == 0:
            what = "a single number" if parameter.requires_grad else "kept fixed by the model"
            raise UserError(
                f"method.kind: {method.kind} given, but {name} is {what}; accepted for this model: "
                "methods that leave the backbone frozen"
            )


def _selected(model: nn.Module, method: FullOptions) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter), tied ones under each name."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if method.selects(type(module).__name__, name):
                yield f"{path}.{name}" if path else name, parameter
