"""The reference: transformers' own model, run block by block with the weights of the run's model.

It is built anew from config.json: its modules, operators, masks and buffers share nothing with the
run's model. Only the values of parameters come from there, gathered by the engine and dequantised
when a block is about to run, and released right after: it needs the memory of one plain block.
"""

import itertools
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.factors import Part, merged
from adapters.layers.base import PackedLayer
from adapters.units import transformer_blocks
from trainer.distributed.failures import is_lost_connection
from trainer.errors import UserError, first_line
from trainer.loading.source import Source
from trainer.model.attention import OURS
from trainer.model.backbone import TrainedModule, class_name
from trainer.model.hub import load_model_config, resolve_folder
from trainer.model.meta import compute_buffers, parameters_on_meta
from trainer.session import Session
from trainer.tasks.base import without_cache
from trainer.verification.calls import Calls, recorded

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class Pass:
    """Results of a forward pass."""

    calls: Calls
    """Of the blocks."""
    logits: Tensor


class Reference:
    """The unmodified model of a session; its parameters are on meta between passes."""

    def __init__(self, session: Session):
        self.session = session
        self.model = plain_model(session)
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        paths = [path for path, _ in transformer_blocks(session.model)]
        self.blocks = {path: self.model.get_submodule(path) for path in paths}
        self._inside = tuple(f"{path}." for path in paths)
        self._large = self._embeddings_and_head()

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of its buffers, persistent ones from the files."""
        session = self.session
        source = Source(session.backbone, session.config, session.world.device)
        for name, buffer in list(self.model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            if attribute not in self.model.get_submodule(owner)._non_persistent_buffers_set:
                stored = source.stored(name)
                if stored is not None and stored.shape == buffer.shape:
                    buffer.copy_(stored)
            yield name, buffer

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of its largest block."""
        blocks = (block.parameters() for block in self.blocks.values())
        return max((sum(p.numel() for p in block) * dtype.itemsize for block in blocks), default=0)

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor], dtype: torch.dtype, inside: str | None = None) -> Pass:
        """A forward pass in `dtype`; `inside`: the block whose modules' calls are recorded too.
        Collective under engines whose gathers are."""
        with ExitStack() as stack:
            stack.enter_context(self.session.engine.unsharded(self.session.model))
            outside = [name for name in self._empty if not name.startswith(self._inside)]
            stack.enter_context(self._filled(outside, dtype))
            stack.enter_context(_casting(self.model, self.blocks.values(), dtype))
            for path, block in self.blocks.items():
                stack.enter_context(self._filled_while_it_runs(path, block, dtype))
            calls = stack.enter_context(recorded(self.blocks, inside))
            with computing(self.session), without_cache(self.model) as arguments:
                output = self.model(**inputs, **arguments)
        return Pass(calls, self.session.task.logits(output))

    @contextmanager
    def _filled_while_it_runs(self, path: str, block: nn.Module, dtype: torch.dtype) -> Any:
        names = [name for name in self._empty if name.startswith(f"{path}.")]
        ours = self.session.model.get_submodule(path)
        running = ExitStack()

        def before(*_: Any) -> None:
            running.enter_context(self.session.engine.unsharded(ours))
            running.enter_context(self._filled(names, dtype))

        handles = [
            block.register_forward_pre_hook(before),
            block.register_forward_hook(lambda *_: running.close(), always_call=True),
        ]
        try:
            yield
        finally:
            running.close()
            for handle in handles:
                handle.remove()

    @contextmanager
    def _filled(self, names: list[str], dtype: torch.dtype) -> Iterator[None]:
        """Context in which these parameters have the values of the run's model, in `dtype`."""
        own = self.session.backbone.dtype
        for name in names:
            keeps = name in self._large or dtype == own
            value = plain_value(self.session.model, name, own if keeps else dtype, keeps=keeps)
            assert value.shape == self._empty[name].shape, name
            self._set(name, nn.Parameter(value, requires_grad=False))
        try:
            yield
        finally:
            for name in names:
                self._set(name, self._empty[name])

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        self._owner(name)._parameters[name.rpartition(".")[2]] = parameter

    def _embeddings_and_head(self) -> set[str]:
        """Names of the parameters of embeddings and the output head outside the blocks: too large
        to be copied, they keep their dtype."""
        head = self.model.get_output_embeddings()
        return {
            f"{path}.{name}"
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) or (head is not None and module is head)
            for name in module._parameters
            if not path.startswith(self._inside)
        }


@contextmanager
def computing(session: Session) -> Iterator[None]:
    """Context of a model's forward pass, which raises whatever its records lead to: raises
    UserError in its place. Other errors in it pass: a lost peer, want of memory, what hooks of the
    engine or of a proof raise."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        names = [str(frame.f_globals.get("__name__")) for frame in frames]
        called = itertools.dropwhile(lambda name: name in _CALLERS, names)
        if is_lost_connection(error) or any(name.startswith(_NOT_THE_MODEL) for name in called):
            raise
        raise UserError(
            f"{class_name(session.model)} cannot compute these records: {first_line(error)}; a "
            "fault of this program or of a library it uses: nothing was trained "
            "(run.verify=off trains regardless)"
        ) from error


_CALLERS = (__name__, "trainer.verification.forward")
_NOT_THE_MODEL = (
    "trainer.engine", "trainer.distributed", "trainer.verification", "torch.distributed",
    "deepspeed",
)  # fmt: skip
"""Modules whose code runs in hooks of a forward pass."""


def plain_model(session: Session) -> "PreTrainedModel":
    """The model as transformers builds it: parameters on meta, buffers filled, on the device. May
    draw from torch's random generator."""
    options, device = session.config.model, session.world.device
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    config = load_model_config(folder, options)
    session.task.configure(config)
    if session.backbone.added is not None:
        session.backbone.added.resize(config)
    with parameters_on_meta():
        model = session.task.auto_class.from_config(
            config,
            dtype=session.backbone.dtype,
            attn_implementation=None if options.attention in OURS else options.attention,
            trust_remote_code=False,
        )
    compute_buffers(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.requires_grad_(False).eval()


def plain_value(model: nn.Module, name: str, dtype: torch.dtype, *, keeps: bool) -> Tensor:
    """The value of the plain model's parameter `name` in the run's model, which must be unsharded:
    dequantised in `dtype`, and as the files orient it. `keeps`: parameters that are no matrices of
    adapted layers keep their dtype (a router's bias may be float32 beside bfloat16)."""
    owner, _, attribute = name.rpartition(".")
    module, trained = submodule(model, owner)
    held = getattr(module, attribute)
    layer = module if attribute == "weight" else None
    if isinstance(held, PackedLayer):  # a stack of experts, which the plain model holds itself
        layer = held
    if not isinstance(layer, PackedLayer):
        return held.detach() if keeps and not trained else held.detach().to(dtype)
    value = layer.dequantised(dtype)
    for index, adapted in layer.adapted_layers.items():
        if adapted.frozen is not None:  # an earlier stage's, a part of what is started from
            value = value.clone()
            matrix = value if index is None else value[index]
            matrix.copy_(merged(matrix, [Part(adapted.frozen)]))
    return value.mT if layer.transposed else value  # the plain model holds (in, out)


def submodule(model: nn.Module, path: str) -> tuple[nn.Module, bool]:
    """The run's module in the place of the plain model's, and whether it is inside the wrapper of a
    trained one, which computes in float32."""
    module, trained = model, False
    for part in path.split(".") if path else ():
        module = getattr(module, part)
        if isinstance(module, TrainedModule):
            module, trained = module.inner, True
    return module, trained


@contextmanager
def _casting(model: "PreTrainedModel", blocks: Any, dtype: torch.dtype) -> Iterator[None]:
    """Context in which embeddings and the output head, which keep their own dtype, take and give
    `dtype`."""
    inner = {id(module) for block in blocks for module in block.modules()}
    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(lambda module, inputs, output: _cast(output, dtype))
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module) not in inner
    ]
    if head is not None:
        handles.append(
            head.register_forward_pre_hook(
                lambda head, inputs: (inputs[0].to(head.weight.dtype), *inputs[1:])
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(output: Any, dtype: torch.dtype) -> Any:
    """An embedding's output in `dtype`; some return the positions that they looked up as well."""
    if isinstance(output, tuple):
        return tuple(_cast(part, dtype) for part in output)
    return output.to(dtype) if output.is_floating_point() else output
