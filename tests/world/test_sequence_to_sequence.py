"""Tiny T5 and BART learn to turn words round: alone, on two ranks, resumed, exported to PEFT."""

import itertools
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.helpers import ALL, losses, quick_config, sample, thorough
from tests.tiny_models import PAIRS, save_tiny
from tests.world.cases import ok, run_cases
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.export.export import export_run
from trainer.records.jsonl import read_metrics
from trainer.run.run import run

WORDS = ["red", "sun", "old", "two", "man", "sea", "top", "day"]
STEPS, SHORT = 100, 20
MODELS = {  # learning rate, token accuracy after STEPS; loss after SHORT steps, at most
    "t5": ("1e-2", 0.98, 3.5),
    "bart": ("5e-3", 0.8, 5.0),
}
ENGINES = ["fsdp2", "deepspeed"]
VARIANTS = {
    "float32": [],
    "nf4": ["model.quantization=nf4"],
    "by-tokens": ["data.micro_batch_size=null", "data.micro_batch_tokens=96"],
}
CASES = list(itertools.product(MODELS, ENGINES, VARIANTS))
USUAL = [("t5", "fsdp2", "float32"), ("bart", "deepspeed", "nf4")]


def configuration(tmp: Path, model: str, name: str, *changes: str) -> Config:
    records = f"{tmp}/words.jsonl"
    return quick_config(
        tmp, f"run.name={name}", f"model.id={tmp}/{model}", "model.dtype=float32",
        "task.kind=sequence_to_sequence", "task.max_target_length=16", f"data.train={records}",
        f"data.eval={records}", "data.eval_records=56", "data.max_length=16",
        "data.prompt='{prompt}'", "data.completion=completion", "data.batch_size=14",
        "data.micro_batch_size=7", "method.rank=16", "method.alpha=32",
        "method.targets=all-linear", f"optim.learning_rate={MODELS[model][0]}", *changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for model in MODELS:
        save_tiny(folder / model, model, PAIRS)
    pairs = itertools.permutations(WORDS, 2)
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a}"} for a, b in pairs]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def learned(tmp) -> dict[str, Config]:
    """Runs of one process that learn the whole set."""
    models = MODELS if ALL else ["t5"]
    found = {model: configuration(tmp, model, model, f"run.steps={STEPS}") for model in models}
    for config in found.values():
        run(config, World())
    return found


def logits(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=targets).logits


@pytest.mark.parametrize("model", sample(MODELS, "t5"))
def test_it_learns_and_peft_and_a_merged_model_compute_the_same(learned, model, tmp_path):
    config = learned[model]
    found, least = losses(config.run_folder), MODELS[model][1]
    scores = read_metrics(config.run_folder / "metrics.jsonl")[-1]
    assert found[-1] < found[0] / 4
    assert scores["eval_token_accuracy"] >= least and scores["eval_perplexity"] < 4
    exported = json.loads((config.run_folder / "adapter/adapter_config.json").read_text())
    assert exported["task_type"] == "SEQ_2_SEQ_LM"
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged", measure=False)
    plain, merged = (
        AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (config.model.id, tmp_path / "merged")
    )
    ids, targets = torch.arange(4, 24).view(2, 10), torch.arange(30, 42).view(2, 6)
    before = logits(plain, ids, targets)
    adapted = peft.PeftModel.from_pretrained(plain, config.run_folder / "adapter")
    assert isinstance(adapted, peft.PeftModelForSeq2SeqLM)
    after = logits(adapted, ids, targets)
    assert torch.allclose(after, logits(merged, ids, targets), atol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)
    written = [
        m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (adapted, merged)
    ]
    assert torch.equal(*written)


def short(tmp, model: str, engine: str, variant: str, *changes: str) -> Config:
    return configuration(
        tmp, model, f"{model}-{engine}-{variant}", f"run.steps={SHORT}", f"engine.kind={engine}",
        "data.eval=null", "checkpoint.every=10", "run.verify=auto", *VARIANTS[variant], *changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp) -> Path:
    """Runs of two ranks, and of one; the first is resumed by two ranks under the other engine."""
    chosen = CASES if ALL else USUAL
    for model, variant in {(model, variant) for model, _, variant in chosen}:
        run(short(tmp, model, "single", variant), World())
    runs = {"-".join(case): ("train_only", short(tmp, *case).model_dump()) for case in chosen}
    model, _, variant = USUAL[0]
    again = short(tmp, model, "deepspeed", variant, "run.name=again")
    source = str(tmp / "runs" / "-".join(USUAL[0]))
    runs["again"] = ("resume", {"config": again.model_dump(), "source": source, "step": 10})
    for results in run_cases(tmp / "work", runs).values():
        ok(results)
    return tmp / "runs"


@pytest.mark.parametrize("case", sample(CASES, *USUAL), ids="-".join)
def test_two_ranks_train_as_one(ranks, case):
    model, _, variant = case
    alone, found = losses(ranks / f"{model}-single-{variant}"), losses(ranks / "-".join(case))
    assert found == pytest.approx(alone, rel=1e-4)
    assert found[-1] < MODELS[model][2]


def test_it_resumes_on_another_engine(ranks):
    model, _, variant = USUAL[0]
    alone = losses(ranks / f"{model}-single-{variant}")
    assert losses(ranks / "again") == pytest.approx(alone, rel=1e-4)


@thorough
@pytest.mark.parametrize("kind", ["pissa", "adalora", "dylora", "lalora", "lelora", "weightlora"])
def test_every_method_trains_it(tmp, kind):
    warmup = ["method.warmup_steps=8"] if kind == "weightlora" else []
    config = configuration(
        tmp, "t5", f"t5-{kind}", "run.steps=24", f"method.kind={kind}", "method.rank=8",
        "data.eval=null", *warmup,
    )  # fmt: skip
    run(config, World())
    found = losses(config.run_folder)
    assert found[-1] < found[0]
