"""Tokens per second and peak memory of a training step, on random weights and tokens.

    python -m benchmarks.throughput configs/llama70b_random.yaml [--layers 8,16] [--peer peft]
        [--steps 8] [--profile FILE] [--out FILE.json] [section.key=value ...]

Every rank runs `data.micro_batch_size` sequences of exactly `data.max_length` tokens, all with a
loss. The step time is the median on the slowest rank after two warm-up steps. `--layers` times
shallower models; from two depths the time is extrapolated linearly to the full depth. Shallower
models keep no block unsharded unless `engine.unsharded_blocks` is set: there would be room for all.
FLOPs are those of the matrices (`trainer/model/flops.py`): 4 per token and active parameter of a
frozen backbone, without attention. `--peer peft` also runs PEFT with bitsandbytes on the same
shapes. Under torchrun or the deepspeed launcher several ranks share the work.

    python -m benchmarks.throughput configs/llama8b_random.yaml --data FILE
        [--parts single,packed,unpacked,peft-packed,peft-padded] [--steps 200]
        [--steps-of peft-packed=40 ...] [--records 16x1] [--profile FOLDER] [--out FILE.json]
        model.tokenizer=FOLDER [section.key=value ...]

runs the trainer's own loader on real records instead, and PEFT on the same ones (`parts.py`): real
tokens per second of all steps after the first 20, the part of positions that is no padding, what
was compiled in these steps, seconds to the first step. `--records`: records of a micro-batch, and
micro-batches of a step, where rows are not packed; `data.batch_size` is then of packed rows alone,
of `data.max_length` tokens each. A part that takes half of `--timeout` ends with fewer steps.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.parts import PARTS, Job, compare
from trainer.config.arguments import Parser, among, at_least, counts, new_file
from trainer.config.config import Config, with_overrides
from trainer.data.loader import Step
from trainer.device_memory import peak_gib, release
from trainer.distributed.world import World
from trainer.memory.graphs import capture_graphs
from trainer.memory.planner import make_plan
from trainer.model.backbone import BuiltModel
from trainer.model.build import build
from trainer.model.flops import model_flops
from trainer.model.hub import load_tokenizer
from trainer.run.launch import launched
from trainer.session import open_session
from trainer.tasks.base import Batch
from trainer.tasks.registry import TASKS
from trainer.training.step import Training, train_step
from trainer.training.validation import make_validate

WARM_UP = 2

_HORIZON = 10**6
"""Horizon of the schedules; only a few steps are timed."""

Contestant = Callable[[Config, World], tuple[Callable[[], None], int]]
"""Prepares a model. Returns its training step and its number of trained parameters."""


@dataclass
class Figures:
    """Measurements for one depth, or the extrapolation to the full depth."""

    who: str
    layers: int
    trainable: int | None
    step_seconds: float
    tokens_per_second: float
    """Per rank."""
    tflops: float
    share_of_ceiling: float
    peak_gib: float | None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("--layers", type=counts, default="")
    parser.add_argument("--steps", type=at_least(1), help="timed (8; with --data 200)")
    parser.add_argument("--peer", choices=["peft"])
    parser.add_argument("--profile", type=Path, help="file for the kernels of one step; with --data"
                        " a folder for tables of five steps")  # fmt: skip
    parser.add_argument("--out", type=new_file)
    parser.add_argument("--data", help="records to train on")
    parser.add_argument("--parts", type=among(PARTS), default=list(PARTS))
    parser.add_argument("--steps-of", type=part_steps, action="append", default=[])
    parser.add_argument("--records", type=records)
    parser.add_argument("--warm-up", type=at_least(1), default=20)
    parser.add_argument("--timeout", type=at_least(1), default=3600, help="seconds of a part")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.data is not None:
        job = Job(
            arguments.config, arguments.data, arguments.overrides, arguments.records,
            arguments.warm_up, arguments.timeout, arguments.profile,
        )  # fmt: skip
        steps = dict.fromkeys(arguments.parts, arguments.steps or 200)
        steps |= {part: n for part, n in arguments.steps_of if part in steps}
        sys.exit(0 if compare(job, steps, arguments.out) else 1)
    with launched(arguments.config, arguments.overrides) as (config, world):
        full = depth(config, world)
        depths = arguments.layers or [full]
        ceiling = matmul_ceiling(world.device)
        found: list[Figures] = []
        contestants: dict[str, Contestant] = {"rankcast": ours}
        if arguments.peer == "peft":
            from benchmarks.peer import peft_step

            contestants["peft"] = peft_step
        for who, prepare in contestants.items():
            timed = []
            for count in depths:
                changes = [f"model.overrides.num_hidden_layers={count}"]
                if count < full and config.engine.unsharded_blocks == "auto":
                    changes.append("engine.unsharded_blocks=0")
                shorter = with_overrides(config, changes)
                seconds, trainable = measure(
                    prepare, shorter, world, arguments.steps or 8, arguments.profile
                )
                timed.append(figures(who, shorter, world, count, trainable, seconds, ceiling))
                release(world.device)
            found += timed
            if len(timed) == 2 and full not in depths:
                further = extrapolated(timed, config, world, full, ceiling)
                found += [further] if further else []
        if world.is_main:
            report(found, config, world, ceiling, arguments.out)


def part_steps(text: str) -> tuple[str, int]:
    """Argument type: `PART=STEPS`."""
    part, _, steps = text.partition("=")
    if part not in PARTS or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} given; accepted: PART=STEPS, PART one of {', '.join(PARTS)}"
        )
    return part, int(steps)


def records(text: str) -> tuple[int, int]:
    """Argument type: `RECORDSxMICRO_BATCHES`, such as 16x2."""
    size, _, count = text.partition("x")
    if not all(part.isdecimal() and int(part) > 0 for part in (size, count or "1")):
        raise argparse.ArgumentTypeError(f"{text} given; accepted: such as 16x2")
    return int(size), int(count or "1")


class SameBatch:
    """A loader of one micro-batch per rank, the same in every step."""

    def __init__(self, batch: Batch, world: World):
        self.micro_batch_size = batch.targets.shape[0]
        weight, tokens = batch.weight * world.size, batch.tokens * world.size
        rows, length = batch.targets.shape
        lengths = np.full(rows * world.size, length)
        self._step = Step([(world.rank, batch)], weight, tokens, lengths, epoch=0.0)

    def next_step(self) -> Step:
        return self._step


def ours(config: Config, world: World) -> tuple[Callable[[], None], int]:
    """This project's training step."""
    session = open_session(config, world)
    vocabulary = session.model.config.vocab_size
    ids = torch.randint(3, min(vocabulary, 32000), shape(config), device=world.device)
    weight = ids.numel() - ids.shape[0]
    batch = Batch({"input_ids": ids}, ids, weight, ids.numel())
    plan = make_plan(session, batch=batch)
    for remark in (session.engine.gathers, plan, capture_graphs(session, [batch])):
        if world.is_main and remark:
            print(remark, flush=True)

    validate, number = make_validate(session), itertools.count()
    training = Training(session, SameBatch(batch, world), _HORIZON, validate)
    session.method.set_horizon(_HORIZON, lambda step: 1.0)
    session.method.on_train_begin(session.optimizer, validate)

    def step() -> None:
        train_step(training, next(number))

    return step, session.optimizer.numel


def shape(config: Config) -> tuple[int, int]:
    return config.data.micro_batch_size, config.data.max_length


def measure(
    prepare: Contestant, config: Config, world: World, steps: int, profile: Path | None = None
) -> tuple[float, int]:
    """(median seconds of a step on the slowest rank, number of trained parameters)."""
    step, trainable = prepare(config, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    seconds = []
    for _ in range(WARM_UP + steps):
        world.gather(None)
        started = time.perf_counter()
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(max(world.gather(time.perf_counter() - started)))
    if profile is not None:
        write_profile(step, world, profile)
    return statistics.median(seconds[WARM_UP:]), trainable


def write_profile(step: Callable[[], None], world: World, file: Path) -> None:
    """Append a table of the kernels of one more step, the longest first."""
    with torch.profiler.profile() as profiler:
        step()
    if world.is_main:
        by = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{table}\n")


def depth(config: Config, world: World) -> int:
    return int(built(config, world).model.config.num_hidden_layers)


def built(config: Config, world: World) -> BuiltModel:
    """The model without its weights."""
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    return build(config, task, world.device)


def figures(
    who: str, config: Config, world: World, layers: int, trainable: int | None, seconds: float,
    ceiling: float,
) -> Figures:  # fmt: skip
    """`trainable` None: an extrapolated time, without memory."""
    micro, length = shape(config)
    speed = micro * length / seconds
    work = model_flops(built(config, world).model, trains=config.method.kind == "full")
    assert work is not None, "a model whose FLOPs are known"
    without_attention = replace(work, windows=[])
    tflops = without_attention.of_step(np.full(micro, length), micro * length) / seconds / 1e12
    held = None if trainable is None else max(world.gather(peak_gib(world.device)))
    return Figures(who, layers, trainable, seconds, speed, tflops, tflops / ceiling, held)


def extrapolated(
    timed: list[Figures], config: Config, world: World, layers: int, ceiling: float
) -> Figures | None:
    """The full depth's step time, linear in that of two shallower models; None if it decreases."""
    first, second = timed
    slope = (second.step_seconds - first.step_seconds) / (second.layers - first.layers)
    if slope <= 0:
        return None
    seconds = second.step_seconds + slope * (layers - second.layers)
    return figures(first.who, config, world, layers, None, seconds, ceiling)


def matmul_ceiling(device: torch.device) -> float:
    """TFLOP/s of a large product in bfloat16 (on a CPU: a small one in float32)."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


def report(
    found: list[Figures], config: Config, world: World, ceiling: float, out: Path | None
) -> None:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    model = f"{config.run.name}, {config.model.quantization}, {config.method.kind}"
    job = f"{model}, {world.size} x {device}"
    print(f"{job}, torch {torch.__version__}; matmul ceiling {ceiling:.0f} TFLOP/s")
    print(
        "| | layers | trains | step, s | tokens/s per rank | 4P TFLOP/s | of ceiling | peak, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for f in found:
        trains = "extrapolated" if f.trainable is None else f"{f.trainable:,}"
        peak = "" if f.peak_gib is None else f"{f.peak_gib:.1f}"
        speed = f"{f.step_seconds:.3f} | {f.tokens_per_second:.0f} | {f.tflops:.0f}"
        print(f"| {f.who} | {f.layers} | {trains} | {speed} | {f.share_of_ceiling:.0%} | {peak} |")
    if out is not None:
        data = {"job": job, "ceiling": ceiling, "figures": [asdict(f) for f in found]}
        out.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
