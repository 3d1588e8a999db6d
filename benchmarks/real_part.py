"""One part of `benchmarks.throughput --data`: steps of one contestant on one form of the records.

    python -m benchmarks.real_part PART CONFIG [--steps 200] [--warm-up 20] [--profile FILE]
        [--out FILE.json] [--seconds N] [section.key=value ...]

A process of its own, so that the time to the first step, memory and compiled programs are those of
this part. Under torchrun several ranks share the work (not PEFT's).
"""

import time

_STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402

from benchmarks.parts import PARTS  # noqa: E402
from trainer.config.arguments import Parser, at_least, new_file  # noqa: E402
from trainer.config.config import Config  # noqa: E402
from trainer.data.dataset import TokenDataset  # noqa: E402
from trainer.data.loader import Loader, Step  # noqa: E402
from trainer.data.prefetch import Prefetcher  # noqa: E402
from trainer.device_memory import GIB, modules_set_aside, peak_gib  # noqa: E402
from trainer.distributed.world import World  # noqa: E402
from trainer.memory.graphs import capture_graphs, row_batches  # noqa: E402
from trainer.memory.planner import make_plan  # noqa: E402
from trainer.model.compilations import Compilations  # noqa: E402
from trainer.run.launch import launched  # noqa: E402
from trainer.session import Session, open_data, open_session  # noqa: E402
from trainer.tasks.base import Batch  # noqa: E402
from trainer.training.loop import make_loader  # noqa: E402
from trainer.training.step import Training, settled, train_step  # noqa: E402
from trainer.training.validation import make_validate  # noqa: E402
from trainer.verification.verify import verify_session  # noqa: E402

PROFILED = 5
"""Steps of a profile."""

Steps = Iterator[tuple[int, int]]
"""Runs a step whenever it is advanced; yields its (real tokens, positions) on this rank."""


@dataclass
class Part:
    """What was measured."""

    part: str
    tokens_per_second: float
    """Real tokens over the seconds of all timed steps, per rank."""
    median_tokens_per_second: float
    """Of single steps."""
    tokens_per_step: float
    fill: float
    """Real tokens over positions that are computed."""
    step_seconds: float
    """Median of the slowest rank, as the next."""
    slowest_over_median: float
    first_step_seconds: float
    """From the start of the process to the end of the first step."""
    programs: int
    """Compiled in the timed steps."""
    kernels: int
    programs_before: int
    steps: int
    peak_gib: float
    """Of tensors outside CUDA graphs."""
    reserved_gib: float
    """Of the caching allocator, graphs included; 0 on a CPU."""
    seconds: list[float]
    """Of every step."""
    about: list[str]
    device: str


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("config")
    parser.add_argument("--steps", type=at_least(1), default=200)
    parser.add_argument("--warm-up", type=at_least(1), default=20)
    parser.add_argument("--seconds", type=at_least(1), help="of steps, at most, but one is timed")
    parser.add_argument("--profile", type=new_file)
    parser.add_argument("--out", type=new_file)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    with launched(arguments.config, arguments.overrides) as (config, world), ExitStack() as stack:
        stack.enter_context(modules_set_aside())  # as in a run
        run = {"single": single, "peft": peft}.get(PARTS[arguments.part], real)
        about: list[str] = []
        total = arguments.warm_up + arguments.steps + PROFILED * (arguments.profile is not None)
        steps = run(config, world, total, about, stack)
        found = measure(
            arguments.part, steps, arguments.warm_up, arguments.steps, world, arguments.seconds
        )
        found.about = about
        if arguments.profile is not None:
            write_profile(steps, world, arguments.profile)
        if world.is_main:
            print(json.dumps({k: v for k, v in asdict(found).items() if k != "seconds"}, indent=1))
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")


def measure(
    part: str, steps: Steps, warm_up: int, count: int, world: World, limit: float | None = None
) -> Part:
    """Time `count` steps after `warm_up`; fewer where all together take `limit` seconds."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    seconds, tokens, positions, first = [], [], [], 0.0
    before = 0
    with Compilations() as compiled, settled():
        for index in range(warm_up + count):
            if index == warm_up:
                before = compiled.programs
                compiled.programs = compiled.kernels = 0
            started = time.perf_counter()
            real, computed = next(steps)
            _synchronise(world)
            seconds.append(max(world.gather(time.perf_counter() - started)))
            first = first or time.time() - _STARTED
            tokens.append(real)
            positions.append(computed)
            if index >= warm_up and limit is not None and sum(seconds) > limit:
                break
    own, slow = tokens[warm_up:], seconds[warm_up:]
    totals = world.gather((sum(own), sum(positions[warm_up:])))
    real, computed = sum(t for t, _ in totals) / world.size, sum(p for _, p in totals) / world.size
    median = statistics.median(slow)
    cuda = world.device.type == "cuda"
    return Part(
        part=part,
        tokens_per_second=real / sum(slow),
        median_tokens_per_second=statistics.median(t / s for t, s in zip(own, slow, strict=True)),
        tokens_per_step=real / len(slow),
        fill=real / computed,
        step_seconds=median,
        slowest_over_median=max(slow) / median,
        first_step_seconds=max(world.gather(first)),
        programs=compiled.programs,
        kernels=compiled.kernels,
        programs_before=before,
        steps=len(slow),
        peak_gib=max(world.gather(peak_gib(world.device))),
        reserved_gib=max(world.gather(_reserved_gib(world.device))),
        seconds=seconds,
        about=[],
        device=torch.cuda.get_device_name(world.device) if cuda else "CPU",
    )


def _reserved_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0


def real(config: Config, world: World, total: int, about: list[str], stack: ExitStack) -> Steps:
    """This project, its own loader and thread."""
    session = open_session(config, world)
    loader = make_loader(session, world)
    batches = stack.enter_context(Prefetcher(loader, world.device, total))
    about.append(str(loader.rows))
    return _ours(session, batches, None, row_batches(session, loader), about)


def single(config: Config, world: World, total: int, about: list[str], stack: ExitStack) -> Steps:
    """This project on documents of `data.max_length` tokens, one a row."""
    session = open_session(config, world)
    data = config.data
    rows = data.micro_batch_size or -(-(data.micro_batch_tokens or 1) // data.max_length)
    count = -(-data.batch_size // (rows * world.size))
    batches = _Documents((rows, data.max_length), count, session, world)
    batch = batches.batch()
    return _ours(session, batches, batch, [batch], about)


class _Documents:
    """Steps of random documents of one length."""

    def __init__(self, shape: tuple[int, int], count: int, session: Session, world: World):
        self._shape, self._count, self._world = shape, count, world
        self._vocabulary = min(session.model.config.vocab_size, 32000)
        self.micro_batch_size = session.config.data.micro_batch_size

    def batch(self) -> Batch:
        ids = torch.randint(3, self._vocabulary, self._shape, device=self._world.device)
        return Batch({"input_ids": ids}, ids, ids.numel() - len(ids), ids.numel())

    def next_step(self) -> Step:
        size, rank = self._world.size, self._world.rank
        made = [(index * size + rank, self.batch()) for index in range(self._count)]
        weight, tokens = (
            sum(getattr(b, name) for _, b in made) * size for name in ("weight", "tokens")
        )
        lengths = np.full(tokens // self._shape[1], self._shape[1])
        return Step(made, weight, tokens, lengths, epoch=0.0)


class _Counted:
    """Counts what a source of steps yields."""

    def __init__(self, source):
        self._source, self.tokens, self.positions = source, 0, 0

    @property
    def micro_batch_size(self) -> int | None:
        return self._source.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        self._source.micro_batch_size = size

    def next_step(self) -> Step:
        step = self._source.next_step()
        self.tokens = sum(batch.tokens for _, batch in step.micro_batches)
        self.positions = sum(batch.targets.numel() for _, batch in step.micro_batches)
        return step


def _ours(
    session: Session, source, batch: Batch | None, shapes: list[Batch], about: list[str]
) -> Steps:
    if session.config.run.verify != "off":
        about.append(verify_session(session).line)
    plan = make_plan(session, batch=batch)
    graphs = capture_graphs(session, shapes)
    about += [session.backbone.attention, str(plan or "no plan for memory"), str(graphs)]
    validate, batches = make_validate(session), _Counted(source)
    training = Training(session, batches, 10**6, validate)
    session.method.set_horizon(10**6, lambda step: 1.0)
    session.method.on_train_begin(session.optimizer, validate)

    def steps() -> Steps:
        number = 0
        while True:
            train_step(training, number)
            number += 1
            yield batches.tokens, batches.positions

    return steps()


def peft(config: Config, world: World, total: int, about: list[str], stack: ExitStack) -> Steps:
    """PEFT with bitsandbytes on the same records in the same steps."""
    from benchmarks.peer import PeftJob

    _, task, data, _ = open_data(config, world)
    loader = Loader(data, task, config.data, config.run.seed, 0, 1)
    job = PeftJob(config, world)
    checkpointing = config.engine.activation_checkpointing is not False
    about.append("full checkpointing" if checkpointing else "no checkpointing")

    def steps() -> Steps:
        while True:
            micro_batches = [batch for _, batch in loader.next_step().micro_batches]
            job.step([peft_inputs(batch, data, world.device) for batch in micro_batches])
            yield (
                sum(batch.tokens for batch in micro_batches),
                sum(batch.targets.numel() for batch in micro_batches),
            )

    return steps()


def peft_inputs(batch: Batch, data: TokenDataset, device: torch.device) -> dict[str, torch.Tensor]:
    """As TRL gives them: packed records are told by their positions, padding by a mask."""
    inputs = {"input_ids": batch.inputs["input_ids"], "labels": batch.targets}
    if batch.documents is not None:
        inputs["position_ids"] = batch.documents.positions
    else:
        lengths = torch.as_tensor(data.lengths[batch.records]).unsqueeze(1)
        inputs["attention_mask"] = (torch.arange(batch.targets.shape[1]) < lengths).long()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def write_profile(steps: Steps, world: World, file: Path) -> None:
    """A table of the kernels, and one of the operators on the CPU, of some steps."""
    _synchronise(world)
    started = time.perf_counter()
    with warnings.catch_warnings(), torch.profiler.profile() as profiler:
        for _ in range(PROFILED):
            next(steps)
        _synchronise(world)
    seconds = time.perf_counter() - started
    if not world.is_main:
        return
    averages = profiler.key_averages()
    on_device = [event for event in averages if event.device_type == DeviceType.CUDA]
    kernels = sum(event.self_device_time_total for event in on_device)
    launches = sum(event.count for event in averages if _launches(event.key))
    lines = [
        f"{PROFILED} steps, per step: {seconds / PROFILED * 1e3:.1f} ms under the profiler, "
        f"{kernels / PROFILED / 1e3:.1f} ms of kernels, {launches / PROFILED:.0f} launches"
    ]
    for by in ("self_device_time_total", "self_cpu_time_total"):
        lines.append(averages.table(sort_by=by, row_limit=35, max_name_column_width=60))
    file.write_text("\n".join(lines), encoding="utf-8")


def _launches(name: str) -> bool:
    return name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync"))


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


if __name__ == "__main__":
    main()
