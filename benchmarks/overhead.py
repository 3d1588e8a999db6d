"""Step time of every method relative to LoRA's of the same rank, on one device.

    python -m benchmarks.overhead [--rounds 30] [--methods lora,lalora] [--out FILE.json]
        [--config FILE.yaml] [section.key=value ...]

A random Llama (or `--config`) of 1.2 billion parameters, global batch 128 sequences of 256 tokens,
bfloat16, in one micro-batch: with smaller ones the GPU waits for launches, whose jitter hides the
differences. All methods are loaded together and alternate, step by step on the same batches, since
the machine's speed drifts. Shown are the median step time, and the median and quartiles of its
ratio to LoRA's in the same round, after the first third (WeightLoRA: after its selection).
`lora-again` is LoRA itself: its ratio's deviation from 1 is noise.
"""

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer.config.arguments import Parser, among, at_least, new_file
from trainer.config.config import load_config
from trainer.distributed.failures import guarded
from trainer.distributed.world import World
from trainer.memory import planner
from trainer.session import Session, open_session
from trainer.training.loop import make_loader
from trainer.training.step import StepDone, Training, train_step
from trainer.training.validation import make_validate

LLAMA = "configs/llama8b_random.yaml"
JOB = [
    "model.quantization=none", "model.overrides.hidden_size=2048",
    "model.overrides.intermediate_size=8192", "model.overrides.num_hidden_layers=16",
    "model.overrides.num_attention_heads=32", "model.overrides.head_dim=64",
    "model.overrides.vocab_size=32768", "data.max_length=256", "data.batch_size=128",
    "data.micro_batch_size=128", "data.leave_out=32", "method.rank=8", "method.alpha=16",
]  # fmt: skip
METHODS = {
    "lora": [],
    "weightlora": ["method.kind=weightlora", "method.warmup_steps=3"],
    "weightlora_plus": ["method.kind=weightlora_plus", "method.warmup_steps=3"],
    "lalora": ["method.kind=lalora"],
    "adalora": ["method.kind=adalora"],
    "lelora-next-batch": ["method.kind=lelora"],
    "lelora-validation": [
        "method.kind=lelora", "method.policy.credit=global", "method.policy.learning_rate=1e-3",
    ],
    "lora-again": [],
}  # fmt: skip


def steps(session: Session, count: int) -> Iterator[StepDone]:
    """Iterate over the steps of a run, without the rest of the training loop."""
    validate = make_validate(session)
    training = Training(session, make_loader(session, session.world), count, validate)
    session.method.set_horizon(count, lambda step: 1.0)
    session.method.on_train_begin(session.optimizer, validate)
    for step in range(count):
        yield train_step(training, step)


def opened(
    name: str, rounds: int, overrides: list[str], world: World, file: str = LLAMA
) -> Session:
    config = load_config(
        file,
        [*JOB, *METHODS[name], f"run.steps={rounds}", f"run.name={name}", *overrides],
    )
    session = open_session(config, world)
    planner.make_plan(session)
    return session


def measure(names: list[str], rounds: int, overrides: list[str], file: str) -> list[dict[str, Any]]:
    """Step time and ratio to the first method's (LoRA) by method."""
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sessions = {name: opened(name, rounds, overrides, world, file) for name in names}
    running = {name: steps(session, rounds) for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        # Rotate the order: a step may be affected by the one before it.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _finish(world)
            started = time.perf_counter()
            next(running[name])
            _finish(world)
            seconds[name].append(time.perf_counter() - started)
    found, settled = [], rounds // 3
    for name, session in sessions.items():
        ratios = np.divide(seconds[name][settled:], seconds[names[0]][settled:])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        found.append({
            "method": name, "step_seconds": statistics.median(seconds[name][settled:]),
            "ratio": middle, "low": low, "high": high, "parameters": session.optimizer.numel,
        })  # fmt: skip
    return found


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=30)
    known = ",".join(METHODS)
    parser.add_argument("--methods", type=among(METHODS), default=known, help=known)
    parser.add_argument("--config", default=LLAMA, help="another model, of the same sizes")
    parser.add_argument("--out", type=new_file)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    found = measure(arguments.methods, arguments.rounds, arguments.overrides, arguments.config)
    print("| method | step, s | over LoRA | quartiles | trainable |\n|---|---|---|---|---|")
    for f in found:
        print("| {method} | {step_seconds:.4f} | {ratio:.3f} | {low:.3f}–{high:.3f} | "
              "{parameters:,} |".format(**f))  # fmt: skip
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with guarded():
        main()
