"""Step time and peak memory of every method over LoRA's of the same rank, on one device.

    python benchmarks/overhead.py OUT [--steps 30] [--methods lora,lalora] [section.key=value ...]

A random Llama of 1.2 billion parameters, global batch 128 sequences of 256 tokens, bfloat16. The
step time is the median over the logged steps after the first third (WeightLoRA: after its
selection); LoRA runs first and last, and both are shown.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from trainer.config import load_config
from trainer.distributed import World
from trainer.jsonl import read_metrics
from trainer.memory import release
from trainer.run import run
from trainer.start import guarded

JOB = [
    "model.quantization=none", "model.overrides.hidden_size=2048",
    "model.overrides.intermediate_size=8192", "model.overrides.num_hidden_layers=16",
    "model.overrides.num_attention_heads=32", "model.overrides.head_dim=64",
    "model.overrides.vocab_size=32768", "data.max_length=256", "data.batch_size=128",
    "data.micro_batch_size=32", "data.leave_out=32", "method.rank=8", "method.alpha=16",
    "log.every=1", "log.tensorboard=false", "log.progress=none", "run.resume=never",
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


def measure(name: str, out: Path, steps: int, overrides: list[str], world: World) -> dict:
    """One run's median step time and peak memory."""
    config = load_config(
        "configs/llama8b_random.yaml",
        [*JOB, *METHODS[name], f"run.steps={steps}", f"run.dir={out}", f"run.name={name}",
         *overrides],
    )  # fmt: skip
    run(config, world)
    lines = [
        line for line in read_metrics(out / name / "metrics.jsonl") if line["step"] > steps // 3
    ]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    release(world.device)
    return {
        "method": name,
        "step_seconds": statistics.median(line["step_seconds"] for line in lines),
        "fastest": min(line["step_seconds"] for line in lines),
        "slowest": max(line["step_seconds"] for line in lines),
        "peak_memory_gib": lines[-1]["peak_memory_gib"],
        "parameters": lines[-1]["trainable_parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", default=",".join(METHODS), help=", ".join(METHODS))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    print("| method | step, s | fastest–slowest | over LoRA | peak, GiB | trainable |")
    print("|---|---|---|---|---|---|")
    for name in arguments.methods.split(","):
        result = measure(
            name, arguments.out, arguments.steps, arguments.overrides, World(device=device)
        )
        results.append(result)
        (arguments.out / "overhead.json").write_text(json.dumps(results, indent=1))
        ratio = result["step_seconds"] / results[0]["step_seconds"]
        print(
            f"| {name} | {result['step_seconds']:.4f} | {result['fastest']:.4f}–"
            f"{result['slowest']:.4f} | {ratio:.3f} | {result['peak_memory_gib']:.2f} | "
            f"{result['parameters']:,} |",
            flush=True,
        )


if __name__ == "__main__":
    with guarded():
        main()
