"""Predict a run's memory per GPU, and whether it fits, from shapes: without a GPU or weights.

The sum of the backbone, adapters with gradients and moments, gather buffers (`footprint.py`), and
the peak of a training step (`fake_probe.py`).
"""

from dataclasses import dataclass, replace

import torch

from trainer.config.config import Config
from trainer.config.engines import AUTO, takes
from trainer.config.sections import EngineOptions
from trainer.data.dataset import TokenDataset
from trainer.device_memory import GIB, readable
from trainer.distributed.world import World
from trainer.engine.base import compiles
from trainer.engine.select import choose, engine_class
from trainer.errors import UserError
from trainer.memory.fake_probe import Probe, probe
from trainer.model.blocks import check_unsharded_blocks
from trainer.model.build import build
from trainer.model.footprint import Estimate, blocks_that_fit, estimate
from trainer.model.image_processor import load_processor
from trainer.tasks.registry import TASKS

CONTEXT = GIB
"""Allowance for a process's GPU memory that is not tensors: the CUDA context, kernel code, library
handles. torch's counters do not include it."""
COLLECTIVES = GIB
"""Allowance for NCCL's buffers, with several ranks."""
COPY_ENGINES = GIB // 2
"""Allowance for the second communicator of copy-engine all-gathers."""


@dataclass(frozen=True)
class Prediction:
    """Memory of one rank (bytes), and the plan of the run."""

    engine: str
    reason: str
    holds_gather_buffers: bool
    """Whether the buffers of gathered blocks stay allocated through the update."""
    gpus: int
    states: Estimate
    probe: Probe
    saved: int
    """Number of blocks that save their activations on the GPU."""
    offloaded: int
    """Number of blocks that offload them to the host."""
    unsharded: int
    """Number of blocks kept unsharded between steps."""
    memory: int
    """Of the GPU."""
    allowance: int
    """For memory that torch's counters do not include."""
    sharded: dict[int, Estimate]
    """`states` with the backbone sharded over more GPUs, by number of GPUs."""
    graphs: int = 0
    """Of CUDA graphs."""
    possible_graphs: int = 0
    """Of those that `engine.cuda_graphs: auto` would capture where the GPU waits for launches, and
    only if they fit: not part of the peak."""

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of each phase of a step, as `torch.cuda.max_memory_allocated` counts them."""
        backbone = self.states.backbone + self.unsharded * self.states.block + self.graphs
        base = backbone + self.states.gathered + self.states.held
        forward, backward = self.probe.peaks(self.saved, self.offloaded)
        buffers = self.states.gathered if self.holds_gather_buffers else 0
        step = backbone + buffers + self.states.trainable
        return {"forward": base + forward, "backward": base + backward, "update": step}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def graphed(self) -> int:
        """Bytes held where every row of a step runs as a CUDA graph: activations are in the graphs,
        and only what the model computes outside its blocks is beside them."""
        outside = self.probe.forward - self.probe.inputs
        graphs = self.graphs or self.possible_graphs
        return self.states.backbone + self.states.held + graphs + outside

    @property
    def fits(self) -> bool:
        return self.peak + self.allowance <= self.memory

    def parts(self) -> dict[str, int]:
        """Contributions to `peak`, by name; they sum to it."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        states, probe, saved = self.states, self.probe, self.probe.saved(self.saved)
        inputs = probe.inputs - max(0, self.offloaded - 1) * probe.input
        parts = {"backbone": states.backbone, "adapters, gradients, moments": states.held}
        if self.unsharded:
            parts["unsharded blocks"] = self.unsharded * states.block
        if self.graphs:
            parts["CUDA graphs"] = self.graphs
        if phase == "update":
            rest = self.peak - sum(parts.values())
            return {**parts, "gathered layers and temporaries of the update": rest}
        peak = probe.peaks(self.saved, self.offloaded)[phase == "backward"]
        return {
            **parts,
            "gathered layers": states.gathered,
            "inputs of blocks": inputs,
            "saved activations": saved,
            f"temporaries of {phase}": peak - inputs - saved,
        }


def predict(
    config: Config, gpus: int, memory: int, hosts: int = 1, records: TokenDataset | None = None
) -> Prediction:
    """The prediction for `gpus` GPUs of `memory` bytes each, spread evenly over `hosts`, with the
    longest of `records`; without them, with sequences of `data.max_length` tokens. Raises
    UserError where the configuration, or this number of GPUs, cannot run."""
    if config.engine.device == "cpu":
        raise UserError("engine.device: cpu given; accepted: auto or cuda, the estimate is a GPU's")
    if config.method.trains != "adapters":
        raise UserError(
            f"method.kind: {config.method.kind} given; accepted: methods whose adapters are those "
            "here; `rankcast train --dry-run` tells the weights, gradients and moments of others"
        )
    task = TASKS[config.task.kind](config.task, load_processor(config))
    task.learn_labels(["0", "1"])  # their number hardly matters
    device = torch.device("cuda")
    launcher = "torchrun" if gpus > 1 or config.engine.config else "none"
    ranks = range(gpus)
    nodes = tuple(tuple(ranks[i::hosts]) for i in range(hosts))
    world = World(size=gpus, device=device, launcher=launcher, gpu_bytes=memory, nodes=nodes)
    kind, reason = choose(config, world, task)
    engine = engine_class(kind)
    engine.check(config)
    backbone = build(config, task, device)
    states = estimate(backbone, config, gpus, engine.spread, local_ranks=gpus // hosts)
    sharded = {n: estimate(backbone, config, n, "split") for n in (2, 4, 8, 16, 32, 64)}
    found = probe(backbone, config, task, compiled=compiles(config, engine, backbone, device),
                  records=records)  # fmt: skip
    check_unsharded_blocks(config.engine, len(found.added))
    copies = takes(kind, "copy_engines") and gpus > hosts == 1
    copies = copies and bool(config.engine.copy_engines)
    allowance = CONTEXT + (COLLECTIVES if gpus > 1 else 0) + (COPY_ENGINES if copies else 0)
    budget = int(config.engine.memory_fraction * memory) - allowance
    plan = _plan(config.engine, found, states, budget, can_unshard=takes(kind, "unsharded_blocks"))
    buffers = engine.holds_gather_buffers
    graphs = _graphs(config.engine, kind, found, plan[0])
    asked = config.engine.cuda_graphs is True
    return Prediction(
        kind, reason, buffers, gpus, states, found, *plan, memory, allowance, sharded,
        graphs=graphs * asked, possible_graphs=graphs * (not asked),
    )  # fmt: skip


def _graphs(options: EngineOptions, kind: str, probe: Probe, saved: int) -> int:
    """Bytes of CUDA graphs: a pass through all blocks, and hidden states and gradients before and
    behind them. 0 where there can be none."""
    if options.cuda_graphs is False or not takes(kind, "cuda_graphs") or saved < len(probe.added):
        return 0
    return probe.inputs + probe.saved(saved) + 4 * probe.input


def _plan(
    options: EngineOptions, probe: Probe, states: Estimate, budget: int, *, can_unshard: bool
) -> tuple[int, int, int]:
    """Numbers of blocks that save their activations, offload them, and stay unsharded."""
    unsharded = 0 if options.unsharded_blocks == "auto" else options.unsharded_blocks
    if options.activation_checkpointing != "auto":
        return 0 if options.activation_checkpointing else len(probe.added), 0, unsharded
    left = budget - states.backbone - unsharded * states.block - states.gathered - states.held
    saved, offloaded = probe.plan(left, int(options.activation_offload * GIB))
    if can_unshard and options.unsharded_blocks == "auto":
        left -= max(*probe.peaks(saved, offloaded), states.update)
        unsharded = blocks_that_fit(len(probe.added), states.block, left)
    return saved, offloaded, unsharded


def table(prediction: Prediction) -> str:
    """The prediction as text: contributions, plan and verdict."""
    p, blocks = prediction, len(prediction.probe.added)
    reason = f" ({p.reason})" if p.reason else ""
    offloaded = f", {p.offloaded} offload them to the host" * bool(p.offloaded)
    recomputed = ", the others recompute them" * (p.saved + p.offloaded < blocks)
    unsharded = f"; {p.unsharded} stay unsharded" * bool(p.unsharded)
    rest = offloaded + recomputed + unsharded
    lines = [
        f"engine          {p.engine}{reason}, {p.gpus} GPU(s)",
        f"activations     {p.saved} of {blocks} blocks keep theirs{rest}",
        "memory per rank at its peak",
        *(f"  {name:<30}{readable(size):>14}" for name, size in p.parts().items()),
        f"  {'peak of tensors':<30}{readable(p.peak):>14}",
        f"  {'allowed for CUDA' + (' and NCCL' if p.gpus > 1 else ''):<30}"
        f"{readable(p.allowance):>14}",
        f"  {'of a GPU with':<30}{readable(p.memory):>14}",
    ]
    if p.possible_graphs:
        lines.append(
            f"with CUDA graphs, where the GPU would wait, {readable(p.possible_graphs)} more; "
            f"steps in them hold {readable(p.graphed)}"
        )
    return "\n".join([*lines, "fits" if p.fits else f"does not fit: {advice(prediction)}"])


def advice(prediction: Prediction) -> str:
    """One line: a change with which the run would fit."""
    if prediction.unsharded and replace(prediction, unsharded=0).fits:
        return "with engine.unsharded_blocks=auto it would"
    p = replace(prediction, saved=0, offloaded=0, unsharded=0)
    if p.fits:
        return "with engine.activation_checkpointing=auto it would"
    missing = f"{readable(p.peak + p.allowance - p.memory)} too much with every block checkpointed"
    for gpus, states in p.sharded.items():
        if replace(p, gpus=gpus, states=states).fits:
            return f"{missing}; with engine.kind={AUTO['split']} on {gpus} GPUs it would"
    return (
        f"{missing}; accepted: a lower data.micro_batch_size, data.max_length or method.rank, or "
        "a smaller model.quantization"
    )
