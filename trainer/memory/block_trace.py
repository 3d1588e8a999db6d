"""Saved and temporary bytes of a transformer block, without a GPU or weights.

A block runs on fake tensors, which have shapes and no bytes. Where blocks are compiled, its joint
graph goes through the compiler's own partitioner with the same settings (`blocks.py`), which
decides what is saved and what is recomputed. Otherwise `Meter` counts what autograd saves.

Fake tensors are on the CPU, where attention is a flash kernel too: it saves q, k, v, the output and
one log-sum-exp per row and head, as a GPU's kernels do, by document or not.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.layers.handles import RegisteredLayer
from trainer.model.blocks import configure_compiler, hidden_state


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block for one micro-batch."""

    saved: int
    """Saved for backward without checkpointing, excluding the block's input."""
    forward: int
    """Peak of forward, excluding the input, including `saved`."""
    backward: int
    """Peak of backward, excluding the input and the output's gradient, including `saved`."""


@dataclass(frozen=True)
class Call:
    """A block, the arguments of a call by the model, and its output."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Products:
    """Temporary bytes of the adapted layers' operators, such as the dequantised W."""

    def __init__(self, layers: Iterable[nn.Module], dropout: bool):
        self._dropout = dropout
        self._matrices = {
            (layer.stacked, *layer.shape[-2:]): layer
            for layer in layers
            if isinstance(layer, PackedLayer)
        }

    def bytes_of(self, target: Any, tensors: list[Tensor]) -> int:
        """Temporary bytes of one call of `target` with these arguments and results; 0 for other
        operators."""
        if not isinstance(target, OpOverload) or target.namespace != "rankcast":
            return 0
        name = target._schema.name
        stacked, backward = "experts" in name, "backward" in name
        x, y = (tensors[1], tensors[0]) if backward else (tensors[0], tensors[-1])
        layer = self._matrices[stacked, y.shape[-1], x.shape[-1]]
        fmt = FORMATS[layer.weight_format]
        if stacked:
            needed = fmt.unpacked_bytes(layer.matrix_shape, x.dtype)
        else:
            rows = x.numel() // x.shape[-1]
            needed = fmt.product_bytes(layer.matrix_shape, rows, x.dtype, backward=backward)
        # Dropout: the mask and the dropped input; in backward also the product before dropout.
        return needed + self._dropout * (3 if backward else 2) * _nbytes(x)


class Meter(TorchDispatchMode):
    """Counts the live bytes of tensors created in this mode, and their peak."""

    def __init__(self, known: Iterable[Any], products: Products):
        super().__init__()
        self.held = self.peak = 0
        self._products = products
        self._seen = {id(t.untyped_storage()) for t in known if isinstance(t, Tensor)}

    def spike(self, nbytes: int) -> None:
        """Account for a temporary of `nbytes`."""
        self.peak = max(self.peak, self.held + nbytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        for tensor in results:
            self._see(tensor)
        given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        self.spike(self._products.bytes_of(func, [*given, *results]))
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.held += size
        weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


class WorstCase(TorchFunctionMode):
    """Every position has a loss, so that no shape depends on data. Attention runs without dropout:
    a CPU kernel would save the mask, which GPU kernels regenerate."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0].flatten(0, args[1].dim() - 1).clone()
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def compiled(call: Call, products: Products) -> BlockBytes:
    """`BlockBytes` of a compiled block. Must run under FakeTensorMode."""
    forward, backward, outputs = _partitioned(call)
    made = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    given = forward.graph.find_nodes(op="placeholder")
    # The block's inputs, weights and output are counted elsewhere.
    foreign = _storages([*given, *made[:outputs]])
    saved = sum(size for key, size in _storages(made[outputs:]).items() if key not in foreign)
    inside = {node.name for node in made[outputs:]} - {node.name for node in given}
    return BlockBytes(saved, _peak(forward, set(), products), _peak(backward, inside, products))


def eager(call: Call, products: Products) -> BlockBytes:
    """`BlockBytes` of an uncompiled block. Must run under FakeTensorMode."""
    flat, _ = tree_flatten((call.args, call.kwargs))
    weights = [*call.block.parameters(), *call.block.buffers()]
    args = (call.args[0].detach().requires_grad_(), *call.args[1:])
    with Meter([*flat, *weights, args[0]], products) as meter:
        outputs = call.block(*args, **call.kwargs)
        output = hidden_state(outputs)
        saved, forward = meter.held - _nbytes(output), meter.peak
        meter.peak = meter.held
        gradient = torch.empty_like(output)
        before = _nbytes(output) + _nbytes(gradient)
        torch.autograd.backward(output, gradient)
    return BlockBytes(saved, forward, meter.peak - before)


def _partitioned(call: Call) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """The block's forward and backward graph, and the number of forward's results; its further
    outputs are saved for backward."""
    configure_compiler()
    from functorch.compile import (
        aot_function,
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._inductor.decomposition import select_decomp_table

    flat, spec = tree_flatten((call.args, call.kwargs))
    indices = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    layers = [m for m in call.block.modules() if isinstance(m, RegisteredLayer)]
    weights = dict(call.block.named_parameters()) | dict(call.block.named_buffers())

    def run(weights: Mapping[str, Tensor], handles: list[Tensor], tensors: list[Tensor]) -> Tensor:
        values = list(flat)
        for index, tensor in zip(indices, tensors, strict=True):
            values[index] = tensor
        args, kwargs = tree_unflatten(values, spec)
        with _handles(layers, handles):
            # Called as a module, hooks included, as under torch.compile.
            return hidden_state(torch.func.functional_call(call.block, dict(weights), args, kwargs))

    found: list[tuple[fx.GraphModule, fx.GraphModule, int]] = []

    def partition(joint, inputs, *, num_fwd_outputs, **options):
        halves = min_cut_rematerialization_partition(
            joint, inputs, **{"compiler": "inductor", **options}, num_fwd_outputs=num_fwd_outputs
        )
        found.append((*halves, num_fwd_outputs))
        return halves

    def unchanged(graph: fx.GraphModule, _: Any) -> Callable:
        return make_boxed_func(graph)

    handles = [torch.zeros((), requires_grad=True) for _ in layers]
    tensors = [flat[index].detach() for index in indices]
    tensors[0].requires_grad_()
    aot_function(
        run, fw_compiler=unchanged, bw_compiler=unchanged, partition_fn=partition,
        decompositions=select_decomp_table(),
    )(weights, handles, tensors)  # fmt: skip
    return found[0]


@contextmanager
def _handles(layers: list[RegisteredLayer], handles: list[Tensor]) -> Iterator[None]:
    own = [layer.handle for layer in layers]
    try:
        for layer, handle in zip(layers, handles, strict=True):
            layer.__dict__["handle"] = handle
        yield
    finally:
        for layer, handle in zip(layers, own, strict=True):
            layer.__dict__["handle"] = handle


def _peak(module: fx.GraphModule, inside: set[str], products: Products) -> int:
    """Peak bytes of running a graph operator by operator; inputs count only if named in `inside`.

    A pointwise operator whose users are all pointwise is fused into them: its result is never
    materialised, and its arguments live until the users run.
    """
    from torch._functorch.partitioners import get_default_op_list

    fusible = get_default_op_list().is_fusible
    nodes = list(module.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    groups: dict[int, list[fx.Node]] = {}  # nodes by storage, its creator first
    sizes: dict[int, int] = {}
    for node in nodes:
        for key, size in _storages([node]).items():
            groups.setdefault(key, []).append(node)
            sizes[key] = size
    birth: dict[int, int] = {}
    death: dict[int, int] = {}
    runs: dict[fx.Node, int] = {}  # when a node's arguments are read
    for node in reversed(nodes):
        keys = [key for key in _storages([node]) if groups[key][0] is node]
        users = [u for key in keys for n in groups[key] for u in n.users if u not in groups[key]]
        fused = (
            bool(keys) and bool(users) and node.op == "call_function"
            and fusible(node) and all(fusible(user) for user in users)
        )  # fmt: skip
        last = max((runs[user] for user in users), default=order[node])
        runs[node] = last if fused else order[node]
        if not keys and node.op == "call_function":  # a view
            runs[node] = max([order[node], *(runs[u] for u in node.users)])
        for key in keys:
            if not fused and (node.op != "placeholder" or node.name in inside):
                birth[key], death[key] = (0 if node.op == "placeholder" else order[node]), last
    change = [0] * (len(nodes) + 1)
    for key, start in birth.items():
        change[start] += sizes[key]
        change[death[key] + 1] -= sizes[key]
    held = peak = 0
    for index, node in enumerate(nodes):
        held += change[index]
        given = [a.meta.get("val") for a in tree_leaves(node.args) if isinstance(a, fx.Node)]
        tensors = [value for value in given if isinstance(value, Tensor)]
        results = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        peak = max(peak, held + products.bytes_of(node.target, [*tensors, *results]))
    return peak


def _storages(nodes: Iterable[Any]) -> dict[int, int]:
    """Bytes of the nodes' values by storage; views share one."""
    found = {}
    for node in nodes:
        for value in tree_leaves(node.meta.get("val")) if isinstance(node, fx.Node) else ():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return found


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
