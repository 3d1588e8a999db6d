"""Find linear layers whose output never reaches the loss: their adapters would not train.

Cross-attention without an encoder's states, poolers, towers for images on text, indexers that only
choose tokens, what a last layer computes beside its hidden states: no attribute tells. So the task
computes the loss of a tiny batch of text with the model on meta (`shape_mode.py`), and the layers
whose outputs are in its graph are those that are reached.

Not found here, but by the run's first steps (`verification/first_steps.py`): a gradient that is 0
by its value, and layers of models that do not run without values.
"""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from adapters.layers.base import PackedLayer
from trainer.model.shape_mode import ShapeMode
from trainer.tasks.base import Batch, Task
from trainer.tasks.positions import longest_text

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_ROWS = 2
_SHORT, _LONG = 32, 256
"""Tokens of a row. A layer that few tokens do not reach may need more: a compressed block, a window
that is overrun."""
_RUNS_ON_META = (None, "eager", "sdpa")
_OWN = ("adapters", "trainer", "torch")


def find_unreached(
    model: "PreTrainedModel", task: Task, names: Collection[str], max_length: int
) -> set[str]:
    """Those of `names` (`adapters.units.linear_names`) whose layer's output does not reach the loss
    of texts up to `max_length` tokens. None of them where the model does not run without values.
    The model, on meta, is as before."""
    paths = {name: _module(model, name) for name in names}
    left = set(paths.values())
    table = longest_text(model)
    most = max_length if table is None else min(max_length, table // 2)  # its end may be special
    for length in sorted({min(_SHORT, most), min(_LONG, most)}):
        if not left:
            break
        try:
            left &= _unreached(model, task, left, length)
        except Exception:  # whatever code raises that looks at values which do not exist
            return set()
    return {name for name, path in paths.items() if path in left}


def summarised(names: Collection[str], chosen: Collection[str]) -> list[str]:
    """Short paths for those of the layers `names` that are `chosen`: of a module whose layers all
    are, and with `*` for any block where it is so in all blocks."""
    others = [name.split(".") for name in set(names).difference(chosen)]
    mixed = {tuple(parts[:length]) for parts in others for length in range(1, len(parts) + 1)}
    everywhere = {_any_block(parts) for parts in mixed}
    found = set()
    for name in chosen:
        parts = tuple(name.split("."))
        top = next(
            parts[:length] for length in range(1, len(parts) + 1) if parts[:length] not in mixed
        )
        pattern = _any_block(top)
        found.add(".".join(top if pattern in everywhere else pattern))
    return sorted(found)


def _any_block(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in parts)


def _module(model: nn.Module, name: str) -> str:
    """The path of the module that computes a layer: an expert's is its stack."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), PackedLayer) else name


def _unreached(
    model: "PreTrainedModel", task: Task, paths: Collection[str], length: int
) -> set[str]:
    outputs: dict[str, list[Any]] = {path: [] for path in paths}
    hidden: set[str] = set()

    def note(path: str, output: Tensor) -> Tensor:
        output = output.clone()  # no view, which a change in place would take out of the graph
        if output.grad_fn is not None:
            outputs[path].append(output.grad_fn)
        else:
            hidden.add(path)
        return output

    batch = _batch(task, length)
    with _unchanged(model), torch.random.fork_rng([]), torch.enable_grad(), ShapeMode():
        for path in paths:
            model.get_submodule(path).register_forward_hook(
                lambda _module, _inputs, output, path=path: note(path, output)
            )
        loss, _ = task.loss(model, batch)
    graph = _graph(loss.grad_fn)
    if not any(_is_foreign(node) for node in graph):
        hidden.clear()
    return {
        path
        for path, nodes in outputs.items()
        if path not in hidden and not any(node in graph for node in nodes)
    }


def _batch(task: Task, length: int) -> Batch:
    """Rows of ordinary tokens, which stand for no image, with an end."""
    tokenizer = task.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = (token for token in range(len(tokenizer)) if token not in special)
    ids = [*itertools.islice(ordinary, length)]
    ids = [*itertools.islice(itertools.cycle(ids or [0]), length)]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids[-1] = ids[-1] if end is None else end
    return task.collate([[task.made_up(ids)]] * _ROWS)


@contextmanager
def _unchanged(model: "PreTrainedModel") -> Iterator[None]:
    """Within this context all parameters require gradients and buffers are copies. Models keep
    tables and masks for later and set switches in their configuration: all of it is put back."""
    held = [(container, copy.copy(container)) for container in _containers(model)]
    learned = [parameter.requires_grad for parameter in model.parameters()]
    try:
        if model.config._attn_implementation not in _RUNS_ON_META:
            model.set_attn_implementation("eager")
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for container, before in held:
            container.clear()
            getattr(container, "extend" if isinstance(container, list) else "update")(before)
        for parameter, requires_grad in zip(model.parameters(), learned, strict=True):
            parameter.requires_grad_(requires_grad)


def _containers(model: nn.Module) -> list[Any]:
    """The dictionaries, lists and sets that modules and their configurations consist of."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [*model.modules()]
    while waiting:
        held = vars(waiting.pop())
        if id(held) not in found:
            found[id(held)] = held
            for value in held.values():
                if isinstance(value, PretrainedConfig):
                    waiting.append(value)
                elif type(value) in (dict, OrderedDict, list, set):
                    found.setdefault(id(value), value)
    return [*found.values()]


def _graph(node: Any) -> set[Any]:
    """A node of autograd's graph and all that it leads to."""
    found, waiting = {node}, [node]
    while waiting:
        for inner, _ in waiting.pop().next_functions:
            if inner is not None and inner not in found:
                found.add(inner)
                waiting.append(inner)
    return found


def _is_foreign(node: Any) -> bool:
    """Whether a node is an autograd.Function of the model's code, which may compute layers again in
    its backward pass (reversible blocks): they have no graph."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] not in _OWN
