"""Tokens per second of generation beside transformers' own `generate`.

    python -m benchmarks.generation SOURCE [--prompts 32] [--length 256] [--peer merged,peft]
        [--out FILE.json] [generation.batch_size=32 section.key=value ...]

SOURCE is a run, a checkpoint, an adapter's folder, or the configuration of a run with random
weights (answers then differ). Prompts are random tokens of `--length`, and half of it, in turn;
every answer has exactly `generation.max_new_tokens` tokens, and is the likeliest. `--peer`: also
transformers' `generate` on the model with the adapter merged (dequantised), and with PEFT's adapter
beside it (of random weights: as quantised as ours, by bitsandbytes; else not), on the same prompts
in the same batches. The first batch of each is not timed. One process.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peer import PeftJob, _random_model
from trainer.config.arguments import Parser, among, at_least, new_file
from trainer.config.config import Config, load_config, with_overrides
from trainer.config.dtype import compute_dtype
from trainer.device_memory import peak_gib, release
from trainer.distributed import process_group
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.export.peft_folder import is_adapter
from trainer.generation.generate import generate
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.run.launch import configure_libraries
from trainer.run.saved_model import open_saved_model, saved_model_config
from trainer.session import open_model
from trainer.tasks.registry import TASKS

Generate = Callable[[list[list[int]]], list[list[int]]]
"""New tokens of each prompt."""
PEERS = ("merged", "peft")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--prompts", type=at_least(1), default=32)
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a prompt")
    parser.add_argument("--peer", type=among(PEERS), default=[], help=", ".join(PEERS))
    parser.add_argument("--out", type=new_file)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    configure_libraries()
    config = configuration(arguments.source, arguments.overrides)
    world = process_group.start(config.engine.device)
    rows = prompts(arguments, config)
    found, answers = {}, {}
    contestants: dict[str, Any] = {"rankcast": ours, "merged": merged, "peft": with_peft}
    for who in ["rankcast", *arguments.peer]:
        if world.device.type == "cuda":
            release(world.device)  # what the one before has left
            torch.cuda.reset_peak_memory_stats(world.device)
        with contestants[who](arguments.source, config, world) as continue_prompts:
            figures, answers[who] = timed(continue_prompts, rows, config, world)
        del continue_prompts  # and with it the model
        same = sum(a == b for a, b in zip(answers[who], answers["rankcast"], strict=True))
        found[who] = figures | {"same_answers": f"{same} of {len(rows)}"}
        print(f"{who:<10}{json.dumps(found[who])}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    process_group.stop()


def configuration(source: Path, overrides: Sequence[str]) -> Config:
    if not is_random(source):
        return saved_model_config(source, overrides)
    config = load_config(source, overrides)
    if config.model.weights != "random":
        raise UserError(f"{source}: model.weights: pretrained given; accepted: random, or a run")
    return config


def is_random(source: Path) -> bool:
    return source.suffix == ".yaml"


def prompts(arguments: argparse.Namespace, config: Config) -> list[list[int]]:
    """Random tokens, the longest first."""
    size = len(load_tokenizer(config.model))
    generator = torch.Generator().manual_seed(0)
    lengths = [arguments.length // (1 + index % 2) for index in range(arguments.prompts)]
    return [
        torch.randint(4, size, (length,), generator=generator).tolist()
        for length in sorted(lengths, reverse=True)
    ]


def timed(
    run: Generate, rows: list[list[int]], config: Config, world: World
) -> tuple[dict[str, Any], list[list[int]]]:
    """(figures, new tokens of each prompt)"""
    run(rows[: config.generation.batch_size])
    began = time.perf_counter()
    answers = run(rows)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, answers))
    return {
        "tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 2),
        "tokens": tokens, "peak_gib": round(peak_gib(world.device), 2),
    }, answers  # fmt: skip


@contextmanager
def ours(source: Path, config: Config, world: World) -> Iterator[Generate]:
    if is_random(source):
        model = open_model(config, world)
    else:
        model = open_saved_model(source, config, world)
    # Answers of one length: no token ends them.
    model.backbone.model.generation_config.eos_token_id = None
    with patch("trainer.generation.generate.end_tokens", lambda *_: []):
        yield lambda rows: [answer.tokens for answer in generate(model, rows, config.generation)]


@contextmanager
def merged(source: Path, config: Config, world: World) -> Iterator[Generate]:
    """transformers on the merged model."""
    if is_random(source):
        shapes = build(config, TASKS["causal_lm"](config.task, load_tokenizer(config.model)),
                       world.device).model.config  # fmt: skip
        yield by_transformers(_random_model(shapes, "none", world.device).eval(), config, world)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "merged"
        if is_adapter(source):
            raise SystemExit("--peer merged: needs a run or a checkpoint")
        export_run(source, out, world, what="merged", measure=False)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype_of(config, world))
    yield by_transformers(model.to(world.device).eval(), config, world)


@contextmanager
def with_peft(source: Path, config: Config, world: World) -> Iterator[Generate]:
    """transformers on PEFT's model."""
    if is_random(source):
        adapted = PeftJob(with_overrides(config, ["engine.activation_checkpointing=false"]), world)
        yield by_transformers(adapted.model.eval(), config, world)
        return
    model = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=dtype_of(config, world))
    with tempfile.TemporaryDirectory() as folder:
        adapter = source
        if not is_adapter(source):
            adapter = Path(folder) / "adapter"
            export_run(source, adapter, world, measure=False)
        model = peft.PeftModel.from_pretrained(model, adapter)
    yield by_transformers(model.to(world.device).eval(), config, world)


def dtype_of(config: Config, world: World) -> torch.dtype:
    return compute_dtype(config.model, world.device)


def by_transformers(model: Any, config: Config, world: World) -> Generate:
    """`generate` on batches padded on the left."""
    options = config.generation
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run(rows: list[list[int]]) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(rows), options.batch_size):
            batch: Sequence[list[int]] = rows[first : first + options.batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            out = model.generate(
                input_ids=ids.to(world.device), attention_mask=mask.to(world.device),
                max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            found += out[:, width:].tolist()
        return found

    return run


if __name__ == "__main__":
    main()
