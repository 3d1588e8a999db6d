"""What a run takes of a GPU's memory, and whether it fits: from shapes, without GPU or weights.

The planner's probe (`activations.py`) runs on fake tensors: the task's own loss and its backward,
with every block checkpointed. What a block keeps and needs comes from `tracing.py`; embedding, loss
head and all else outside the blocks are counted as they run. So nothing here knows an architecture.

Added to that: the backbone's bytes, those of adapters with gradients and moments, and what a
sharder gathers (`memory.py`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.config.sections import EngineOptions
from trainer.device_memory import GIB, readable
from trainer.distributed.world import World
from trainer.engine.base import compiles
from trainer.engine.deepspeed import read_user_json
from trainer.engine.select import choose, engine_class
from trainer.errors import UserError, first_line
from trainer.memory import block_trace
from trainer.memory.block_trace import BlockBytes, Call, Meter, Products, WorstCase
from trainer.memory.planner import Needs, largest_batch
from trainer.model.backbone import BuiltModel, TrainedModule, set_module
from trainer.model.blocks import check_unsharded_blocks, hidden_state
from trainer.model.build import build
from trainer.model.footprint import Estimate, blocks_that_fit, estimate
from trainer.model.hub import load_tokenizer
from trainer.tasks.base import Batch, Task
from trainer.tasks.registry import TASKS

CONTEXT = GIB
"""Allowance for what a process holds on a GPU beside its tensors: the CUDA context, the code of
kernels, libraries' handles. No counter of torch shows it."""
COLLECTIVES = GIB
"""Allowance for NCCL's buffers, where there are several ranks."""
COPY_ENGINES = GIB // 2
"""Allowance for a second communicator, whose all-gather is the copy engines'."""


@dataclass(frozen=True)
class Probe:
    """The planner's probe (bytes beside backbone and adapters), every block checkpointed."""

    inputs: int
    """What the checkpointed blocks keep: their inputs."""
    forward: int
    """Peak of forward and of the loss."""
    backward: int
    """Peak of backward, where one block at a time is computed again."""
    added: tuple[int, ...]
    """By block: what it adds where it keeps its activations."""

    def plan(self, budget: int, room: int = 0) -> tuple[int, int]:
        """How many blocks `activation_checkpointing: auto` lets keep their activations, and how
        many it moves to `room` bytes of the host, if they travel fast enough."""
        blocks, added = len(self.added), max(1, self.added[-1])
        most = min(room // (added + self.input), max(0, blocks - 2))
        needs = Needs(self.forward, self.backward, added, self.input, most)
        offloaded = needs.offloaded(blocks, budget)
        return max(0, needs.saved(blocks, offloaded, budget)), offloaded

    @property
    def input(self) -> int:
        """Of one block."""
        return self.inputs // len(self.added)

    def saved(self, count: int) -> int:
        """Bytes that the last `count` blocks add."""
        return sum(self.added[len(self.added) - count :])

    def peaks(self, count: int, offloaded: int = 0) -> tuple[int, int]:
        """Of forward and of backward, where the last `count` blocks keep their activations and
        `moved` ones have theirs on the host, one on its way. The activations of the block that is
        differentiated are in `backward` already."""
        held = self.saved(count) - max(0, offloaded - 1) * self.input
        travelling, own = (self.added[-1] * bool(number) for number in (offloaded, count))
        return self.forward + held + travelling, self.backward + held + travelling - own


@dataclass(frozen=True)
class Prediction:
    """Memory of one rank (bytes), and what the run would do."""

    engine: str
    reason: str
    gpus: int
    states: Estimate
    probe: Probe
    saved: int
    """Blocks that keep their activations."""
    offloaded: int
    """Blocks that move them to the host."""
    unsharded: int
    """Blocks whose weights stay whole from step to step, where others are gathered."""
    memory: int
    """The GPU's."""
    allowance: int
    """For what no counter of torch shows."""
    sharded: dict[int, Estimate]
    """What `states` would be under fsdp2 on so many GPUs."""

    @property
    def phases(self) -> dict[str, int]:
        """Peak of each phase of a step, as `torch.cuda.max_memory_allocated` would show it."""
        backbone = self.states.backbone + self.unsharded * self.states.block
        base = backbone + self.states.gathered + self.states.held
        forward, backward = self.probe.peaks(self.saved, self.offloaded)
        stages = self.states.gathered if self.engine == "peer" else 0  # there all the time
        step = backbone + stages + self.states.trainable
        return {"forward": base + forward, "backward": base + backward, "update": step}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak + self.allowance <= self.memory

    def parts(self) -> dict[str, int]:
        """What is held when most is; they add up to `peak`."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        states, probe, saved = self.states, self.probe, self.probe.saved(self.saved)
        inputs = probe.inputs - max(0, self.offloaded - 1) * probe.input
        parts = {"backbone": states.backbone, "adapters, gradients, moments": states.held}
        if self.unsharded:
            parts["blocks that stay whole"] = self.unsharded * states.block
        if phase == "update":
            rest = self.peak - sum(parts.values())
            return {**parts, "gathered layers and temporaries of the update": rest}
        peak = probe.peaks(self.saved, self.offloaded)[phase == "backward"]
        return {
            **parts,
            "gathered layers": states.gathered,
            "inputs of blocks": inputs,
            "activations kept": saved,
            f"temporaries of {phase}": peak - inputs - saved,
        }


def predict(config: Config, gpus: int, memory: int, hosts: int = 1) -> Prediction:
    """For `gpus` GPUs of `memory` bytes each, on all of `hosts` alike. Raises UserError where the
    configuration, or this number of GPUs, cannot run."""
    if config.engine.device == "cpu":
        raise UserError("engine.device: cpu given; accepted: auto or cuda, the estimate is a GPU's")
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    task.learn_labels(["0", "1"])  # how many there are hardly matters
    device = torch.device("cuda")
    launcher = "torchrun" if gpus > 1 or config.engine.config else "none"
    ranks = range(gpus)
    nodes = tuple(tuple(ranks[i::hosts]) for i in range(hosts))
    world = World(size=gpus, device=device, launcher=launcher, gpu_bytes=memory, nodes=nodes)
    kind, reason = choose(config, world, task)
    if kind == "deepspeed":
        read_user_json(config)
    backbone = build(config, task, device)
    engine = engine_class(kind)
    states = estimate(backbone, config, gpus, engine.spread, local_ranks=gpus // hosts)
    more = {n: estimate(backbone, config, n, "split") for n in (2, 4, 8, 16, 32, 64)}
    found = probe(backbone, config, task, compiled=compiles(config, engine, backbone, device))
    check_unsharded_blocks(config.engine, len(found.added))
    copies = kind == "fsdp2" and gpus > hosts == 1 and bool(config.engine.copy_engines)
    allowance = CONTEXT + (COLLECTIVES if gpus > 1 else 0) + (COPY_ENGINES if copies else 0)
    budget = int(config.engine.memory_fraction * memory) - allowance
    plan = _plan(config.engine, found, states, budget, fills=engine.supports_unsharded_blocks)
    return Prediction(kind, reason, gpus, states, found, *plan, memory, allowance, more)


def _plan(
    options: EngineOptions, probe: Probe, states: Estimate, budget: int, *, fills: bool
) -> tuple[int, int, int]:
    """Blocks that keep their activations, that move them, and that stay whole, as the options
    say."""
    unsharded = 0 if options.unsharded_blocks == "auto" else options.unsharded_blocks
    if options.activation_checkpointing != "auto":
        return 0 if options.activation_checkpointing else len(probe.added), 0, unsharded
    left = budget - states.backbone - unsharded * states.block - states.gathered - states.held
    saved, offloaded = probe.plan(left, int(options.activation_offload * GIB))
    if fills and options.unsharded_blocks == "auto":
        left -= max(*probe.peaks(saved, offloaded), states.update)
        unsharded = blocks_that_fit(len(probe.added), states.block, left)
    return saved, offloaded, unsharded


def probe(backbone: BuiltModel, config: Config, task: Task, *, compiled: bool) -> Probe:
    """Run the probe on micro-batches of `data.micro_batch_size` sequences of `data.max_length`
    tokens. `backbone`, just built, is used up."""
    for path, module in backbone.heads.items():
        set_module(backbone.model, path, TrainedModule(module))
    data = config.data
    batch = largest_batch(task, data, data.max_length, data.micro_batch_size)
    model = backbone.model.train()
    drops_input = config.method.dropout > 0 and config.method.dropout_on == "input"
    products = Products(model.modules(), drops_input)
    blocks = [block for _, block in transformer_blocks(model)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # what it says of a failure is long
    log.disabled, was_disabled = True, log.disabled
    try:
        with mode, WorstCase():
            _make_fake(model)
            batch = batch.to(torch.device("cpu"))
            batch.inputs = {name: mode.from_tensor(t) for name, t in batch.inputs.items()}
            batch.targets = mode.from_tensor(batch.targets)
            calls = _calls(task, model, batch, blocks)
            measure = block_trace.compiled if compiled else block_trace.eager
            figures = {key: measure(call, products) for key, call in calls.items()}
            return _run(task, backbone, batch, blocks, calls, figures, products)
    except UserError:
        raise
    except Exception as error:  # a model's code may look at values, which fake tensors lack
        raise UserError(
            f"model.id: {config.model.id}: {type(model).__name__} does not run on shapes alone "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        log.disabled = was_disabled


def _make_fake(model: nn.Module) -> None:
    """Every parameter and buffer on the CPU, in shape only."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                module._buffers[name] = made


def _key(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Blocks that are equal in it are one program."""
    return (
        tuple((type(m).__name__, getattr(m, "weight_format", "")) for m in block.modules()),
        tuple((p.shape, p.dtype) for p in block.parameters()),
        tuple((t.shape, t.dtype) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)),
    )


def _calls(task: Task, model: nn.Module, batch: Batch, blocks: list[nn.Module]) -> dict[Any, Call]:
    """One call of every program among the blocks."""
    calls: dict[Any, Call] = {}

    def run(block: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        key = _key(block, args, kwargs)
        if key not in calls:
            calls[key] = Call(block, args, kwargs, forward(*args, **kwargs))
        return tree_map(torch.clone, calls[key].output)

    with torch.no_grad():
        _with_blocks(blocks, run, lambda: task.loss(model, batch))
    return calls


class _Checkpointed(torch.autograd.Function):
    """Stands in for a block: keeps its input, and needs for a moment what the block needs."""

    @staticmethod
    def forward(ctx, x, like, figures: BlockBytes, meter: Meter):
        ctx.save_for_backward(x)
        ctx.figures, ctx.meter = figures, meter
        # Without a graph a checkpointed block frees what it does not keep as it goes along.
        meter.spike(figures.forward)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.meter.spike(max(ctx.figures.forward, ctx.figures.backward))
        return torch.empty_like(x), None, None, None


def _run(
    task: Task,
    backbone: BuiltModel,
    batch: Batch,
    blocks: list[nn.Module],
    calls: dict[Any, Call],
    figures: dict[Any, BlockBytes],
    products: Products,
) -> Probe:
    model = backbone.model
    units = {unit.layer for unit in backbone.units}
    trains = {
        id(block): layer in units or any(p.requires_grad for p in block.parameters())
        for layer, block in enumerate(blocks)
    }
    added: dict[int, int] = {}
    inputs = 0
    known = [*model.parameters(), *model.buffers(), *batch.inputs.values(), batch.targets]
    meter = Meter([*known, *(t for c in calls.values() for t in tree_leaves(c.output))], products)

    def run(block: nn.Module, _: Callable, args: Any, kwargs: Any) -> Any:
        nonlocal inputs
        key = _key(block, args, kwargs)
        x, output, of_block = args[0], calls[key].output, figures[key]
        hidden = hidden_state(output)
        added[id(block)] = 0
        if not x.requires_grad and not trains[id(block)]:  # as in blocks.py
            meter.spike(of_block.forward)
            made = torch.empty_like(hidden)
        else:
            added[id(block)] = of_block.saved
            inputs += x.numel() * x.element_size()
            x = x if x.requires_grad else x.detach().requires_grad_()
            made = _Checkpointed.apply(x, hidden, of_block, meter)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    def step() -> tuple[int, int]:
        with meter:
            loss, _ = task.loss(model, batch)
            forward, meter.peak = meter.peak, meter.held
            loss.backward()
        return forward, meter.peak

    forward, backward = _with_blocks(blocks, run, step)
    return Probe(inputs, forward, backward, tuple(added[id(block)] for block in blocks))


def _with_blocks(blocks: list[nn.Module], run: Callable, step: Callable[[], Any]) -> Any:
    """`step()`, in which `run(block, its forward, args, kwargs)` takes the place of every block."""
    for block in blocks:
        _replace(block, run)
    try:
        return step()
    finally:
        for block in blocks:
            del block.forward


def _replace(block: nn.Module, run: Callable) -> None:
    forward = block.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return run(block, forward, args, kwargs)

    block.forward = replaced  # type: ignore[assignment,method-assign]


def table(prediction: Prediction) -> str:
    """For a person: parts, plan and verdict."""
    p, blocks = prediction, len(prediction.probe.added)
    reason = f" ({p.reason})" if p.reason else ""
    offloaded = f", {p.offloaded} move them to the host" * bool(p.offloaded)
    again = ", the others compute them again" * (p.saved + p.offloaded < blocks)
    unsharded = f"; the weights of {p.unsharded} stay whole" * bool(p.unsharded)
    lines = [
        f"engine          {p.engine}{reason}, {p.gpus} GPU(s)",
        f"activations     {p.saved} of {blocks} blocks keep theirs{offloaded}{again}{unsharded}",
        "memory a rank   when most is held",
        *(f"  {name:<30}{readable(size):>14}" for name, size in p.parts().items()),
        f"  {'peak of tensors':<30}{readable(p.peak):>14}",
        f"  {'allowed for CUDA' + (' and NCCL' if p.gpus > 1 else ''):<30}"
        f"{readable(p.allowance):>14}",
        f"  {'of a GPU with':<30}{readable(p.memory):>14}",
    ]
    return "\n".join([*lines, "fits" if p.fits else f"does not fit: {advice(prediction)}"])


def advice(prediction: Prediction) -> str:
    """One line on what would make it fit."""
    if prediction.unsharded and replace(prediction, unsharded=0).fits:
        return "with engine.unsharded_blocks=auto it would"
    p = replace(prediction, saved=0, offloaded=0, unsharded=0)
    if p.fits:
        return "with engine.activation_checkpointing=auto it would"
    missing = f"{readable(p.peak + p.allowance - p.memory)} too much with every block checkpointed"
    for gpus, states in p.sharded.items():
        if replace(p, gpus=gpus, states=states).fits:
            return f"{missing}; with engine.kind=fsdp2 on {gpus} GPUs it would"
    return (
        f"{missing}; accepted: a lower data.micro_batch_size, data.max_length or method.rank, or "
        "a smaller model.quantization"
    )
