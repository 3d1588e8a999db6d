"""Milliseconds of a decision: made on rank 0, broadcast, applied and verified on all ranks.

    torchrun --nproc_per_node 4 -m benchmarks.decisions configs/mixtral_random.yaml
        [--steps 30] [--methods lelora,lalora] [--out FILE.json] [section.key=value ...]

Short runs of a model with as many units as configured (Mixtral 8x7B: 640), but tiny matrices, since
their size does not matter. The training loop's call is timed on the slowest rank, after a barrier;
the first ten steps are excluded.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any
from unittest.mock import patch

import torch

from trainer.config.arguments import Parser, among, at_least, new_file
from trainer.config.config import Config, load_config
from trainer.decisions import consensus
from trainer.distributed.world import World
from trainer.run.launch import launched
from trainer.run.run import run

WARM_UP = 10
SMALL = [
    "model.overrides.hidden_size=64", "model.overrides.intermediate_size=64",
    "model.overrides.num_attention_heads=4", "model.overrides.num_key_value_heads=2",
    "model.overrides.head_dim=16", "model.overrides.vocab_size=512", "model.quantization=none",
    "data.max_length=64", "data.on_bad_record=skip", "data.packing=false", "data.leave_out=32",
    "log.tensorboard=false", "log.progress=none", "run.resume=never", "engine.compile=false",
]  # fmt: skip
METHODS = {
    "lelora": ["method.kind=lelora", "method.rank=8"],
    "lalora": ["method.kind=lalora"],
    # Decides during warm-up only.
    "weightlora": ["method.kind=weightlora", "method.warmup_steps={last}"],
    "adalora": ["method.kind=adalora", "method.delta_t=1"],
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("--steps", type=at_least(1), default=30)
    known = ",".join(METHODS)
    parser.add_argument("--methods", type=among(METHODS), default=known, help=known)
    parser.add_argument("--out", type=new_file)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    steps = WARM_UP + arguments.steps
    shared = [*SMALL, f"run.steps={steps}", *arguments.overrides]
    with (
        launched(arguments.config, shared) as (config, world),
        tempfile.TemporaryDirectory() as tmp,
    ):
        folder = world.broadcast(tmp)
        if world.is_main:
            print(f"{world.size} x {world.device.type}\n| method | units | ms | slowest |")
            print("|---|---|---|---|")
        found = []
        for name in arguments.methods:
            method = [override.format(last=steps - 1) for override in METHODS[name]]
            changes = [*method, f"run.dir={folder}", f"run.name={name}"]
            config = load_config(arguments.config, [*shared, *changes])
            result = measure(name, config, world)
            found.append(result)
            if world.is_main:
                print("| {method} | {units} | {ms:.2f} | {slowest:.2f} |".format(**result))
        if world.is_main and arguments.out is not None:
            arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def measure(name: str, config: Config, world: World) -> dict[str, Any]:
    """Median and largest milliseconds of a decision in one run."""
    seconds: list[float] = []
    units: list[int] = []
    inner = consensus.decide_and_apply

    def timed(method, *arguments):
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # excludes the step before
        world.gather(None)  # a barrier: excludes waiting for other ranks
        started = time.perf_counter()
        result = inner(method, *arguments)
        seconds.append(time.perf_counter() - started)
        units.append(len(method.units))
        return result

    with patch("trainer.decisions.consensus.decide_and_apply", timed):
        run(config, world)
    slowest = [max(ranks) for ranks in zip(*world.gather(seconds), strict=True)][WARM_UP:]
    return {
        "method": name, "units": units[0], "ms": 1e3 * statistics.median(slowest),
        "slowest": 1e3 * max(slowest),
    }  # fmt: skip


if __name__ == "__main__":
    main()
