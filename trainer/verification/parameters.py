"""Parameters and operators, block by block as the engine gathers them.

Every parameter is set, finite and what the files gave (`trainer/loading/probes.py`). Every adapter
adds what its tensors say: with a momentary random B,

    layer(x) with it − layer(x) without it = x ΔWᵀ
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.gated import GatedAdapter
from adapters.layers.base import PackedLayer
from adapters.seeds import generator
from adapters.units import transformer_blocks
from trainer.loading.probes import differences, probe
from trainer.session import Session

_SAME = 1e-4
"""Relative difference of two probes of a group of the same bits: they are summed in float32."""
_LARGEST_ERROR = 0.5
"""‖W − Ŵ‖ / ‖W‖ that no format exceeds on any matrix (4 bits: 0.1 on normal weights); without its
scales a format does."""
_ROWS = 4  # of x, for each matrix
_EXPERTS = 8  # of a stack, whose adapters are compared
_DOMINANCE = 4.0
"""Norm of the momentary adapter's output relative to the layer's own, so that rounding of the sum
does not hide it."""


@torch.no_grad()
def check_gathered(session: Session) -> str | None:
    """The first fault of a parameter or an adapter's operator, or None. Collective under engines
    whose gathers are."""
    model, engine = session.model, session.engine
    blocks = transformer_blocks(model)
    inside = tuple(f"{path}." for path, _ in blocks)
    found: list[str] = []
    for path, module in [*blocks, ("", model)]:
        with engine.unsharded(module):
            for name, parameter in module.named_parameters(prefix=path):
                if module is not model or not name.startswith(inside):
                    found += _parameter_faults(session, name, parameter)
            for name, layer in module.named_modules(prefix=path):
                # A block may be a layer itself (Gemma 3n's projections between its streams).
                apart = module is not model or not f"{name}.".startswith(inside)
                if isinstance(layer, PackedLayer) and layer.adapts and apart:
                    found += _operator_faults(session, name, layer)
    return found[0] if found else None


def _parameter_faults(session: Session, name: str, parameter: nn.Parameter) -> Iterator[str]:
    if parameter.is_meta:
        yield f"{name}: was never loaded or initialised"
        return
    owner = session.model.get_submodule(name.rpartition(".")[0])
    value: Tensor = parameter
    if isinstance(owner, PackedLayer) and parameter is owner.weight:
        value = owner.dequantised(session.backbone.dtype).view(owner.matrix_shape)
    if not value.is_floating_point():
        return
    found = probe(value)
    if not bool(torch.isfinite(found).all()):
        yield f"{name}: holds values that are not finite"
        return
    noted = session.backbone.probes.get(name)
    if noted is None:  # a trained head, or a weight that no file holds
        return
    loaded, error = noted
    if error > _LARGEST_ERROR:
        yield (
            f"{name}: its {owner.weight_format} values differ from the file's by {error:.0%} "
            "(Frobenius): its scales are wrong"
        )
    expected = torch.tensor(loaded, dtype=torch.float64, device=found.device)
    if parted := _first_rows(found, expected, value):
        yield f"{name}: what {session.engine.kind} gathers is not what was loaded: {parted}"


def _first_rows(found: Tensor, expected: Tensor, value: Tensor) -> str | None:
    """Where two probes of `value` part; None where they do not."""
    if found.shape != expected.shape:
        return f"its shape is {tuple(value.shape)}"
    same = differences(found, expected) <= _SAME
    groups = (~same).nonzero().flatten().tolist()
    if not groups:
        return None
    rows = -(-value.shape[0] // len(same)) if value.dim() else 1
    return (
        f"{len(groups)} of {len(same)} groups of {rows} row(s) differ, from row "
        f"{groups[0] * rows} on"
    )


def _operator_faults(session: Session, path: str, layer: PackedLayer) -> Iterator[str]:
    """Faults of the adapters of one layer, or of some experts of a stack."""
    adapted = {index: one for index, one in layer.adapted_layers.items() if one.adapter is not None}
    chosen = list(adapted)[:: max(1, len(adapted) // _EXPERTS)][:_EXPERTS]
    names = dict(zip(layer.adapted_layers, layer.layer_names(path), strict=True))
    dtype, device = session.backbone.dtype, session.world.device
    tolerance = 1e-3 if dtype == torch.float32 else 0.04
    x = torch.randn(len(chosen) * _ROWS, layer.shape[-1], generator=generator(0)).to(device, dtype)
    with _adapters(layer, {}):
        plain = _output(layer, x, chosen).float()
    momentary, expected = {}, []
    for number, index in enumerate(chosen):
        rows = slice(number * _ROWS, (number + 1) * _ROWS)
        adapter = adapted[index].adapter
        assert adapter is not None
        momentary[index] = made = _with_random_b(adapter, x[rows], plain[rows])
        expected.append(_product(made, x[rows]))
    with _adapters(layer, momentary):
        added = _output(layer, x, chosen).float() - plain
    for number, index in enumerate(chosen):
        found = added[number * _ROWS : (number + 1) * _ROWS]
        wanted = expected[number]
        norm = torch.linalg.vector_norm(wanted)
        if norm == 0 or torch.linalg.vector_norm(found - wanted) <= tolerance * norm:
            continue
        ratio = float((found * wanted).sum() / norm.square())
        proportional = torch.linalg.vector_norm(found - ratio * wanted) <= 2 * tolerance * norm
        cause = (
            f"is {ratio:.3g} times x ΔWᵀ: its scale is left out, or applied twice"
            if proportional and ratio != 0
            else "does not depend on its adapter" if not bool(found.any())
            else "is not x ΔWᵀ"
        )  # fmt: skip
        yield f"{names[index]}: what its adapter adds to the output {cause}"


def _with_random_b(adapter: GatedAdapter, x: Tensor, plain: Tensor) -> GatedAdapter:
    """A copy whose B is random, scaled so that its output dominates the layer's."""
    made = adapter.copy()
    made.B.copy_(torch.randn(made.B.shape, generator=generator(1)).to(made.B))
    norm = torch.linalg.vector_norm(_product(made, x))
    own = torch.linalg.vector_norm(plain)
    if norm > 0 and own > 0:
        made.B.mul_(_DOMINANCE * own / norm)
    return made


def _product(adapter: GatedAdapter, x: Tensor) -> Tensor:
    """x ΔWᵀ in float32, without ΔW, which may be larger than what is left of the memory."""
    return (x.float() @ adapter.A.T * adapter.g) @ adapter.B


@contextmanager
def _adapters(layer: PackedLayer, momentary: Mapping[int | None, GatedAdapter]) -> Iterator[None]:
    """Context in which a layer has only these adapters."""
    held = {index: one.adapter for index, one in layer.adapted_layers.items()}
    try:
        for index, one in layer.adapted_layers.items():
            one.adapter = momentary.get(index)
        yield
    finally:
        for index, one in layer.adapted_layers.items():
            one.adapter = held[index]


def _output(layer: PackedLayer, x: Tensor, chosen: list[int | None]) -> Tensor:
    """The layer's output for rows x; those of a stack belong to the `chosen` experts in turn."""
    if not layer.stacked:
        return layer.forward(x)
    counts = torch.zeros(len(layer.adapted_layers), dtype=torch.int32)
    order = {index: place for place, index in enumerate(layer.adapted_layers)}
    for index in chosen:
        counts[order[index]] = _ROWS
    return layer.forward(x, counts.cumsum(0).int().to(x.device))
