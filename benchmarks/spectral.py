"""Seconds for the singular slices and spectra of all units of a model, on random matrices.

    python -m benchmarks.spectral configs/llama70b_random.yaml [--units 2] [--out FILE.json]
        [section.key=value ...]

What is computed is what the configured method starts from, or LeLoRA's three banks of `method.rank`
where that method splits no matrices. `--units` times so many matrices of every distinct shape (the
median, of whatever rank is slowest) and adds up the units as loading deals them to the ranks, who
wait for each other after every group of blocks; `--units 0` really computes all of them. Under
torchrun several ranks share the work.
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
from adapters.units import Unit
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
            total = added_up(found, backbone, world)
        else:
            total = computed(config, backbone, world)
        peak = max(world.gather(peak_gib(world.device)))
        if world.is_main:
            report(found, total, peak, not arguments.units, config, world, arguments.out)


def slices(config: Config, unit: Unit) -> list[range]:
    """The singular indices that the method takes of a unit."""
    method = METHODS[config.method.kind](config.method, config.run.seed)
    if method.splits_weight:
        return method.ranges(unit)
    d = min(unit.out_features, unit.in_features)
    return [banks.bank(place, config.method.rank, d) for place in banks.LOCATIONS]


def random_matrix(unit: Unit, world: World) -> torch.Tensor:
    """As a file holds it."""
    shape = unit.out_features, unit.in_features
    return torch.randn(shape, dtype=torch.bfloat16, device=world.device) * 0.02


def timed(config: Config, unit: Unit, backbone: BuiltModel, world: World, count: int) -> Figures:
    """Every rank computes `count` matrices of the unit's shape at the same time, after one of
    warm-up."""
    same = [
        u
        for u in backbone.units
        if (u.out_features, u.in_features) == (unit.out_features, unit.in_features)
    ]
    ranges, whole, parts = slices(config, unit), [], []
    for _ in range(1 + count):
        weight = random_matrix(unit, world)
        _finish(world)
        world.gather(None)
        started = time.perf_counter()
        with watched(world) as seconds:
            spectral.singular_triplets(weight, ranges)
        _finish(world)
        whole.append(max(world.gather(time.perf_counter() - started)))
        parts.append({stage: max(world.gather(seconds[stage])) for stage in STAGES})
    split = {stage: statistics.median(part[stage] for part in parts[1:]) for stage in STAGES}
    median = statistics.median(whole[1:])
    return Figures(unit.out_features, unit.in_features, len(same), median, **split)


@contextmanager
def watched(world: World) -> Iterator[dict[str, float]]:
    """Seconds of each stage of what is decomposed inside."""
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


def dealt(backbone: BuiltModel, world: World) -> list[list[tuple[int, Unit]]]:
    """(rank, unit) in the groups in which they are loaded."""
    seen: set[int] = set()
    groups = []
    for group in [*in_groups(backbone.model, world), [("", backbone.model)]]:
        items = param_tasks(backbone, group, seen)
        assign(items, world, splits=True)
        groups.append([
            (item.reader, unit) for item in items for unit in item.units if not item.deferred
        ])  # fmt: skip
    return groups


def added_up(found: list[Figures], backbone: BuiltModel, world: World) -> float:
    """Seconds for all units from those of each shape; of several hosts, the slowest."""
    seconds = {(f.out_features, f.in_features): f.seconds for f in found}
    total = 0.0
    for group in dealt(backbone, world):
        loads = [0.0] * world.size
        for rank, unit in group:
            loads[rank] += seconds[unit.out_features, unit.in_features]
        total += max(world.gather(max(loads)))
    return total


def computed(config: Config, backbone: BuiltModel, world: World) -> float:
    """Seconds in which all units were computed."""
    world.gather(None)
    started = time.perf_counter()
    for group in dealt(backbone, world):
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
    found: list[Figures], total: float, peak: float, really: bool, config: Config, world: World,
    out: Path | None,
) -> None:  # fmt: skip
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    job = f"{config.run.name}, {world.size} x {device}"
    print(f"{job}, torch {torch.__version__}; peak {peak:.1f} GiB")
    print("| shape | units | one, s | Gram | eigh | images and QR | the rest |")
    print("|---|---|---|---|---|---|---|")
    for f in found:
        shape = f"{f.out_features} x {f.in_features}"
        rest = f.seconds - f.gram - f.eigh - f.qr
        parts = f"{f.gram:.3f} | {f.eigh:.3f} | {f.qr:.3f} | {rest:.3f}"
        print(f"| {shape} | {f.units} | {f.seconds:.3f} | {parts} |")
    count = sum(f.units for f in found)
    how = "computed" if really else "carried on"
    print(f"all {count} units on {world.size} rank(s): {total:.1f} s ({how})")
    if out is not None:
        data = {"job": job, "units": count, "ranks": world.size, "seconds": total, "how": how,
                "peak_gib": peak, "shapes": [asdict(f) for f in found]}  # fmt: skip
        out.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
