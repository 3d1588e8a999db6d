"""Time of the truncated SVDs and spectra of all units of a model, on random matrices.

    python -m benchmarks.spectral configs/llama70b_random.yaml [--units 2] [--out FILE.json]
        [section.key=value ...]

Computes the configured method's spectral initialisation, or LeLoRA's three banks of `method.rank`
for methods without one. `--units N` times N matrices of every distinct shape (median, on the
slowest rank) and extrapolates to all units as loading assigns them to the ranks, with a barrier
after every group of blocks; `--units 0` computes all of them. Under torchrun several ranks share
the work.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from adapters import banks, spectral
from adapters.methods.registry import METHODS
from adapters.unit import Unit
from benchmarks.throughput import built
from trainer.config.arguments import Parser, at_least, new_file
from trainer.config.config import Config
from trainer.device_memory import peak_gib
from trainer.distributed.world import World
from trainer.loading.assignment import assign, param_tasks
from trainer.loading.load import in_groups
from trainer.model.backbone import BuiltModel
from trainer.run.launch import launched

STAGES = {"gram": "_gram", "eigh": "_right", "qr": "_slices"}


@dataclass
class Figures:
    """Median seconds of one unit of a shape, on the slowest rank."""

    out_features: int
    in_features: int
    units: int
    """Of the whole model."""
    seconds: float
    gram: float
    eigh: float
    qr: float


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("--units", type=at_least(0), default=2)
    parser.add_argument("--out", type=new_file)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    with launched(arguments.config, arguments.overrides) as (config, world):
        backbone = built(config, world)
        shapes = {(unit.out_features, unit.in_features): unit for unit in backbone.units}
        found = [
            timed(config, unit, backbone, world, arguments.units or 1) for unit in shapes.values()
        ]
        if arguments.units:
            total = extrapolated(found, backbone, world)
        else:
            total = computed(config, backbone, world)
        peak = max(world.gather(peak_gib(world.device)))
        if world.is_main:
            report(found, total, peak, not arguments.units, config, world, arguments.out)


def slices(config: Config, unit: Unit) -> list[range]:
    """The ranges of singular indices that the method uses of a unit."""
    method = METHODS[config.method.kind](config.method, config.run.seed)
    if method.splits_weight:
        return method.ranges(unit)
    d = min(unit.out_features, unit.in_features)
    return [banks.bank(location, config.method.rank, d) for location in banks.LOCATIONS]


def random_matrix(unit: Unit, world: World) -> torch.Tensor:
    """A random bfloat16 matrix of the unit's shape."""
    shape = unit.out_features, unit.in_features
    return torch.randn(shape, dtype=torch.bfloat16, device=world.device) * 0.02


def timed(config: Config, unit: Unit, backbone: BuiltModel, world: World, count: int) -> Figures:
    """Every rank decomposes `count` matrices of the unit's shape concurrently, after a warm-up."""
    same = [
        u
        for u in backbone.units
        if (u.out_features, u.in_features) == (unit.out_features, unit.in_features)
    ]
    ranges, totals, parts = slices(config, unit), [], []
    for _ in range(1 + count):
        weight = random_matrix(unit, world)
        _finish(world)
        world.gather(None)
        started = time.perf_counter()
        with watched(world) as seconds:
            spectral.singular_triplets(weight, ranges)
        _finish(world)
        totals.append(max(world.gather(time.perf_counter() - started)))
        parts.append({stage: max(world.gather(seconds[stage])) for stage in STAGES})
    split = {stage: statistics.median(part[stage] for part in parts[1:]) for stage in STAGES}
    median = statistics.median(totals[1:])
    return Figures(unit.out_features, unit.in_features, len(same), median, **split)


@contextmanager
def watched(world: World) -> Iterator[dict[str, float]]:
    """Context that sums the seconds of each stage of the decompositions within it."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def watch(stage: str, function):
        def run(*arguments):
            _finish(world)
            started = time.perf_counter()
            result = function(*arguments)
            _finish(world)
            seconds[stage] += time.perf_counter() - started
            return result

        return run

    functions = {name: watch(stage, getattr(spectral, name)) for stage, name in STAGES.items()}
    with patch.multiple(spectral, **functions):
        yield seconds


def assigned(backbone: BuiltModel, world: World) -> list[list[tuple[int, Unit]]]:
    """(rank, unit) by group, as loading assigns them."""
    seen: set[int] = set()
    groups = []
    for group in [*in_groups(backbone.model, world), [("", backbone.model)]]:
        tasks = param_tasks(backbone.model, backbone.units, group, seen)
        assign(tasks, world, decompose=True)
        groups.append([
            (task.reader, unit) for task in tasks for unit in task.units if not task.deferred
        ])  # fmt: skip
    return groups


def extrapolated(found: list[Figures], backbone: BuiltModel, world: World) -> float:
    """Seconds for all units, from those of each shape; those of the slowest host."""
    seconds = {(f.out_features, f.in_features): f.seconds for f in found}
    total = 0.0
    for group in assigned(backbone, world):
        loads = [0.0] * world.size
        for rank, unit in group:
            loads[rank] += seconds[unit.out_features, unit.in_features]
        total += max(world.gather(max(loads)))
    return total


def computed(config: Config, backbone: BuiltModel, world: World) -> float:
    """Measured seconds for all units."""
    world.gather(None)
    started = time.perf_counter()
    for group in assigned(backbone, world):
        for rank, unit in group:
            if rank == world.rank:
                spectral.singular_triplets(random_matrix(unit, world), slices(config, unit))
        _finish(world)
        world.gather(None)
    return time.perf_counter() - started


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def report(
    found: list[Figures], total: float, peak: float, measured: bool, config: Config, world: World,
    out: Path | None,
) -> None:  # fmt: skip
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    job = f"{config.run.name}, {world.size} x {device}"
    print(f"{job}, torch {torch.__version__}; peak {peak:.1f} GiB")
    print("| shape | units | one, s | Gram | eigh | images and QR | other |")
    print("|---|---|---|---|---|---|---|")
    for f in found:
        shape = f"{f.out_features} x {f.in_features}"
        rest = f.seconds - f.gram - f.eigh - f.qr
        parts = f"{f.gram:.3f} | {f.eigh:.3f} | {f.qr:.3f} | {rest:.3f}"
        print(f"| {shape} | {f.units} | {f.seconds:.3f} | {parts} |")
    count = sum(f.units for f in found)
    how = "computed" if measured else "extrapolated"
    print(f"all {count} units on {world.size} rank(s): {total:.1f} s ({how})")
    if out is not None:
        data = {"job": job, "units": count, "ranks": world.size, "seconds": total, "how": how,
                "peak_gib": peak, "shapes": [asdict(f) for f in found]}  # fmt: skip
        out.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
