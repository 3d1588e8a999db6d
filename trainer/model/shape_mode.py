"""Run a model whose parameters are on meta: what depends on them has shapes and no values.

Everything else is computed: ids, masks, positions, tables, so that branches on them are taken as in
a run. Whole numbers and booleans that a run would take from unknown values (chosen experts, parts
of a text) are made up once and computed with from there on, so that they agree with each other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_META, _CPU = torch.device("meta"), torch.device("cpu")
_LIKE = {
    _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.empty_like, _aten.rand_like,
    _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty,
}  # fmt: skip
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_CHOICES = {
    _aten.topk, _aten.sort, _aten.argsort, _aten.argmax, _aten.argmin, _aten.max, _aten.min,
    _aten.multinomial,
}  # fmt: skip
_NO = {_aten.isnan, _aten.isinf, _aten.eq}
"""Questions about unknown values whose answer is no; that of others is yes."""


class ShapeMode(TorchDispatchMode):
    """Within this mode tensors on meta are unknown, and others are on the CPU whatever their code
    asks for. Tensors of whole numbers and booleans are never unknown."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, Any] = {}
        """Forms of the results of operators, by what they were called with: operators on meta may
        take a millisecond each, and blocks are alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = _tensors([*args, *kwargs.values()])
        if not any(tensor.is_meta for tensor in tensors):
            if kwargs.get("device") == _META and (tensors or _is_discrete(packet, kwargs)):
                kwargs = {**kwargs, "device": _CPU}
            if packet is _aten.histc and not _is_floating(args[0].dtype):  # not made for the CPU
                return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
            return func(*args, **kwargs)
        if packet is _aten._local_scalar_dense:
            return 1.0
        if packet in _LIKE and not _is_floating(kwargs.get("dtype") or args[0].dtype):
            return func(*args, **{**kwargs, "device": _CPU})
        if packet is _aten._to_copy:
            kwargs = {**kwargs, "device": _META}
        written = _tensors(_arguments(func, args, kwargs, written=True))
        if any(not tensor.is_meta for tensor in written):
            return written[0]  # any values will do
        if packet in _INDEXED:
            args = [args[0], _numbers(args[1]), *args[2:]]
        result = self._on_meta(func, [*map(_unknown, args)], _unknown_in(kwargs))
        return _known(result, lambda one: _made_up(one, func, args, kwargs))

    def _on_meta(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        results = func._schema.returns
        if any(result.alias_info is not None for result in results):  # a view, or in place
            return func(*args, **kwargs)
        key = func, _key(args), _key([*kwargs.items()])
        if key not in self._made:
            self._made[key] = _form(func(*args, **kwargs))
        return _of_form(self._made[key])


def _is_discrete(packet: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return packet is _aten.arange if dtype is None else not _is_floating(dtype)


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _tensors(values: list[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def _arguments(
    func: Any, args: Any, kwargs: dict[str, Any], *, name: str = "", written: bool = False
) -> list[Any]:
    """The values of an operator's arguments of this name, or of those that it changes."""
    return [
        args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
        for index, argument in enumerate(func._schema.arguments)
        if argument.name == name
        or (written and argument.alias_info is not None and argument.alias_info.is_write)
    ]


def _numbers(indices: Any) -> list[Any]:
    """Indices by booleans as numbers: on meta nobody knows how many are true."""
    found: list[Any] = []
    for index in indices:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero().unbind(1) if mask else [index]
    return found


def _unknown(value: Any) -> Any:
    """An argument with its tensors on meta."""
    if isinstance(value, list | tuple):
        return [_unknown(one) for one in value]
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _unknown_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _unknown(value) for name, value in kwargs.items()}


def _key(values: list[Any]) -> Any:
    return tuple(
        (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor)
        else _key(list(value)) if isinstance(value, list | tuple)
        else (type(value), value)
        for value in values
    )  # fmt: skip


def _form(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype
    return [_form(one) for one in result] if isinstance(result, list | tuple) else None


def _of_form(form: Any) -> Any:
    if isinstance(form, list):
        return tuple(_of_form(one) for one in form)
    if form is None:
        return None
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _known(result: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A result with values for its tensors of whole numbers and booleans."""
    if isinstance(result, list | tuple):
        return type(result)([_known(one, make) for one in result])
    if not isinstance(result, Tensor) or not result.is_meta or _is_floating(result.dtype):
        return result
    return make(result)


def _made_up(result: Tensor, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Choices are spread, so that every expert gets tokens."""
    packet = func.overloadpacket
    if result.dtype == torch.bool:
        itself = len(args) > 1 and args[0] is args[1]
        return torch.full(result.shape, packet not in _NO or itself)
    dims = [-1] if packet is _aten.multinomial else _arguments(func, args, kwargs, name="dim")
    dim = dims[0] if dims else None
    if packet not in _CHOICES or dim is None:
        return torch.zeros(result.shape, dtype=result.dtype)
    numbers = torch.arange(result.numel()) % max(1, args[0].shape[dim])
    if result.dim() < args[0].dim():
        return numbers.view(result.shape)
    moved = torch.empty(result.shape, device=_META).movedim(dim, -1)
    return numbers.view(moved.shape).movedim(-1, dim).contiguous()
