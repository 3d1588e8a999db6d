"""Compiled blocks: one program each for the whole run, whatever a method changes, on every engine.

Captured and differentiated by torch.compile, but without its code generator.
"""

import itertools
import os

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import ALL, ROOT, losses, quick_config, save_mixture, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import train_compiled
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.run.run import run

STEPS = 8
ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
VARIANTS = {
    "lora": ["method.dropout=0.1", "model.quantization=nf4"],
    "weightlora_plus": ["method.warmup_steps=3"],  # units go, others grow
    "lalora": ["method.gamma=5", "method.every=1", "model.quantization=nf4"],  # ranks change at every step
    "lelora": ["engine.activation_checkpointing=true", "model.quantization=fp8"],
    "dora": ["model.quantization=nf4"],
    "mixture": [
        "method.kind=lalora", "method.gamma=5", "method.every=1", "method.targets=all-linear",
        "model.quantization=nf4",
    ],
}  # fmt: skip
USUAL = [
    ("lora", "fsdp2"),
    ("weightlora_plus", "peer"),
    ("lelora", "deepspeed"),
    ("mixture", "ddp"),
]
PAIRS = list(itertools.product(VARIANTS, ENGINES)) if ALL else USUAL
KEPT = list(itertools.product(("none", "nf4"), ENGINES)) if ALL else [("nf4", "fsdp2")]


def configuration(tmp, variant: str, engine: str, *changes: str) -> Config:
    # Sequences of all lengths, and no evaluation: without gradients it is another program.
    return quick_config(
        tmp, f"model.id={tmp}/{'mixture' if variant == 'mixture' else 'model'}",
        f"run.steps={STEPS}", f"engine.kind={engine}", f"run.name={variant}-{engine}",
        f"method.kind={variant.replace('mixture', 'lora')}", "data.max_length=64",
        "data.on_bad_record=skip", "data.eval=null", "data.batch_size=8",
        "data.micro_batch_size=2", "engine.compile=true", *VARIANTS[variant], *changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("compiled")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    save_mixture(tmp / "mixture", "mixtral")
    cases = {
        f"{variant}-{engine}": ("train_compiled", configuration(tmp, variant, engine).model_dump())
        for variant, engine in PAIRS
    }
    cases |= {
        f"kept-{fmt}-{engine}": ("kept_for_backward", configuration(
            tmp, "lora", engine, f"model.quantization={fmt}", "method.targets=[q_proj]",
        ).model_dump())
        for fmt, engine in KEPT
    }  # fmt: skip
    results = run_cases(tmp / "work", cases)
    for variant in dict.fromkeys(variant for variant, _ in PAIRS):
        plain = ["engine.compile=false", f"run.name={variant}-plain"]
        run(configuration(tmp, variant, "single", *plain), World())
    return tmp, results


@pytest.mark.parametrize(("variant", "engine"), PAIRS)
def test_blocks_are_compiled_once_and_compute_the_same(outcome, variant, engine):
    tmp, results = outcome
    assert ok(results[f"{variant}-{engine}"]) == [1, 1]  # programs, on each rank
    found = losses(tmp / f"runs/{variant}-{engine}")
    assert len(found) == STEPS
    assert found == pytest.approx(losses(tmp / f"runs/{variant}-plain"), rel=1e-4)


@pytest.mark.parametrize(("fmt", "engine"), KEPT)
def test_no_gathered_weight_is_kept_for_backward(outcome, fmt, engine):
    for used, kept in ok(outcome[1][f"kept-{fmt}-{engine}"]):
        assert used == 14 and kept == 0  # all linear layers, with an adapter or without


def test_in_one_process_too(tmp_path):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    config = configuration(tmp_path, "lalora", "single")
    assert train_compiled(World(), config.model_dump()) == 1
    plain = configuration(tmp_path, "lalora", "single", "engine.compile=false", "run.name=plain")
    run(plain, World())
    assert losses(config.run_folder) == pytest.approx(losses(plain.run_folder), rel=1e-4)
