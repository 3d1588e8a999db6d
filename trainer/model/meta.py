"""Construct a model with its parameters on the meta device and its buffers computed.

Buffers hold values that no file has (rotary frequencies, position ids, masks). Constructors and
`_init_weights`, of a module or of a parent, compute them; so both run as in transformers, on the
CPU, and only parameters are on meta.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.layers.base import PackedLayer

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_SMALL = 1 << 20
"""Numbers in a parameter whose initial values are kept."""
_HUGE = 1 << 26
"""Numbers in a tensor that is no computed buffer: a causal mask of 8192 tokens has as many."""


@contextmanager
def on_meta(seed: int) -> Iterator[Callable[["PreTrainedModel"], dict[str, Tensor]]]:
    """Parameters of models that are made inside are on meta, their buffers on the CPU.

    The function that it yields finishes a model: it moves the rest of its parameters to meta and
    returns the initial values of the small ones that are neither `weight` nor `bias` (decays,
    sinks, scales of layers), by name. They are the same for the same `seed`.
    """
    with parameters_on_meta(besides=_is_special), torch.random.fork_rng([]), _MarkEmpty():
        torch.manual_seed(seed)
        yield _take_values


@contextmanager
def parameters_on_meta(
    besides: Callable[[str, Tensor], bool] = lambda name, parameter: False,
) -> Iterator[None]:
    """Context in which a new module's parameters are moved to meta when they are registered, before
    anything fills them, `besides` those for which it says so. Buffers are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not (parameter.is_meta or besides(name, parameter)):
            parameter = _to_meta(parameter)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def compute_buffers(model: "PreTrainedModel") -> None:
    """Initialise a model once more, out of its constructor's context: as after `from_pretrained`,
    buffers are computed with torch's default dtype, not the model's."""
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()


def is_unset(value: Tensor) -> bool:
    """Whether a tensor made inside `on_meta` is as `torch.empty` left it, or still on meta."""
    if value.is_meta:
        return True
    mark = _mark(value.dtype)
    if value.numel() == 0 or mark is None:
        return False
    ends = torch.stack([value[(0,) * value.dim()], value[(-1,) * value.dim()]]).cpu()
    return bool((ends.isnan() if isinstance(mark, float) else ends == mark).any())


def keep_float32(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Make the parameters on meta, and persistent buffers, float32 that transformers loads as such
    beside others of `dtype` (a router's bias, sinks): rounding would change routing and decays.

    Matrices of adapted layers stay in `dtype`, in which these compute.
    """
    plan = model._get_dtype_plan(dtype)
    patterns = [name.replace("*", ".*") for name, kept in plan.items() if kept == torch.float32]
    made: dict[Tensor, Tensor] = {}

    def exact(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not any(re.search(p, name) for p in patterns):
            return tensor
        if tensor not in made:  # tied ones stay tied
            exact = tensor.detach().float()
            kept = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(exact, tensor.requires_grad) if kept else exact
        return made[tensor]

    for path, module in model.named_modules():
        if isinstance(module, PackedLayer):
            continue
        start = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, exact(start + name, parameter))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                setattr(module, name, exact(start + name, buffer))


def _is_special(name: str, parameter: Tensor) -> bool:
    stacked = parameter.dim() > 2
    return name not in ("weight", "bias") and not stacked and parameter.numel() <= _SMALL


def _to_meta(parameter: nn.Parameter) -> nn.Parameter:
    moved = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    moved._is_hf_initialized = True  # type: ignore[attr-defined]  # skipped by `_init_weights`
    return moved


def _take_values(model: "PreTrainedModel") -> dict[str, Tensor]:
    compute_buffers(model)
    values: dict[str, Tensor] = {}
    moved: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            if _is_special(name, parameter) and not is_unset(parameter.detach()):
                values[f"{path}.{name}" if path else name] = parameter.detach()
            # Tied parameters stay tied.
            module._parameters[name] = moved.setdefault(id(parameter), _to_meta(parameter))
    return values


class _MarkEmpty(TorchDispatchMode):
    """Marks the first and the last number of what `torch.empty` returns, so that a tensor that
    nobody filled is found. Filling it whole would touch the memory of every parameter. Huge tensors
    are made on meta at once: a stack of experts may be larger than the host's memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        kwargs = kwargs or {}
        if func.overloadpacket in _FACTORIES and math.prod(args[0]) > _HUGE:
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
        result = func(*args, **kwargs)
        if func.overloadpacket in _EMPTY and not result.is_meta and result.numel():
            mark = _mark(result.dtype)
            if mark is not None:
                result[(0,) * result.dim()] = mark
                result[(-1,) * result.dim()] = mark
        return result


_FACTORIES = {
    torch.ops.aten.empty, torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.full,
    torch.ops.aten.rand, torch.ops.aten.randn,
}  # fmt: skip
_EMPTY = {
    torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
    torch.ops.aten.empty_permuted, torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided,
}  # fmt: skip


def _mark(dtype: torch.dtype) -> float | int | None:
    """A number that no constructor computes; None for booleans, which have none."""
    if dtype == torch.bool:
        return None
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return torch.iinfo(dtype).max // 3
