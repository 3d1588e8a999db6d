"""Answers on every engine are, token for token, what transformers gives on the merged model."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import ALL, ROOT, quick_config, sample
from tests.world.cases import ok, run_cases
from trainer.checkpoint.saved import read_saved
from trainer.config.config import with_overrides
from trainer.distributed.world import World
from trainer.export.export import export_run
from trainer.generation.generate import generate
from trainer.run.run import run
from trainer.run.saved_model import open_saved_model

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
FORMATS = ["none", "nf4"]
USUAL = [
    ("none", "ddp", "greedy"), ("none", "deepspeed", "greedy"), ("nf4", "peer", "greedy"),
    ("nf4", "fsdp2", "greedy"), ("none", "fsdp2", "drawn"),
]  # fmt: skip
CASES = list(itertools.product(FORMATS, ENGINES, ("greedy", "drawn"))) if ALL else USUAL
NEW = 24
DECODING = [f"generation.max_new_tokens={NEW}", "generation.batch_size=2"]
DRAWN = [*DECODING, "generation.temperature=0.8", "generation.top_p=0.9"]


def prompts() -> list[list[int]]:
    """Of unequal length; five, so that in the last round one rank of two has none."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/model")
    lines = (ROOT / "configs/quickstart/eval.jsonl").read_text().splitlines()[:4]
    texts = [json.loads(line)["question"] + "\n" for line in lines]
    return tokenizer([*texts, "One day"])["input_ids"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A trained run of each format, and the model that its export merges."""
    tmp = tmp_path_factory.mktemp("generation")
    for fmt in FORMATS:
        config = quick_config(
            tmp, f"run.name={fmt}", f"model.quantization={fmt}", "optim.learning_rate=0.01",
            "data.eval=null", "method.targets=all-linear",
        )  # fmt: skip
        run(config, World())
        export_run(
            tmp / "runs" / fmt,
            tmp / f"merged-{fmt}",
            World(),
            what="merged",
            measure=False,
            dtype="float32",
        )
    return tmp


@pytest.fixture(scope="module")
def found(work) -> dict[str, list]:
    """Every rank's answers under every engine."""
    cases = {}
    for fmt, engine, how in CASES:
        config = quick_config(
            work, "data.eval=null", "method.targets=all-linear", f"engine.kind={engine}",
            f"model.quantization={fmt}", *(DECODING if how == "greedy" else DRAWN),
        )  # fmt: skip
        argument = {
            "config": config.model_dump(), "source": str(work / "runs" / fmt), "prompts": prompts(),
        }  # fmt: skip
        cases[f"{fmt}-{engine}-{how}"] = ("generated", argument)
    return {name: ok(results) for name, results in run_cases(work / "ranks", cases).items()}


@pytest.fixture(scope="module")
def reference(work) -> dict[str, list[list[int]]]:
    """transformers' own tokens on the merged model, one prompt after the other."""
    answers = {}
    for fmt in FORMATS:
        model = AutoModelForCausalLM.from_pretrained(work / f"merged-{fmt}", dtype=torch.float32)
        answers[fmt] = []
        for ids in prompts():
            row = torch.tensor([ids])
            tokens = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False
            )[0, len(ids) :].tolist()
            if 2 in tokens:
                tokens = tokens[: tokens.index(2)]
            answers[fmt].append(tokens)
    return answers


@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens_are_transformers_own(found, reference, fmt):
    lengths = {len(tokens) for tokens in reference[fmt]}
    assert len(lengths) > 1, "no answer ends early"
    engines = [engine for of, engine, how in CASES if (of, how) == (fmt, "greedy")]
    assert {"fsdp2", "deepspeed"} & set(engines)
    for engine in engines:
        for answers in found[f"{fmt}-{engine}-greedy"]:
            assert [a["tokens"] for a in answers] == reference[fmt], engine
            assert [a["ended"] for a in answers] == [len(t) < NEW for t in reference[fmt]]


@pytest.mark.parametrize("fmt", sample(FORMATS, "none"))
def test_what_is_drawn_does_not_depend_on_the_ranks(work, found, fmt):
    config = quick_config(work, "data.eval=null", f"model.quantization={fmt}",
                          "method.targets=all-linear", *DRAWN)  # fmt: skip
    model = open_saved_model(work / "runs" / fmt, config, World())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    alone = [vars(answer) for answer in generate(model, prompts(), config.generation, seed=3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert alone != [vars(a) for a in generate(model, prompts(), config.generation, seed=4)]
    for engine in [engine for of, engine, how in CASES if (of, how) == (fmt, "drawn")]:
        for answers in found[f"{fmt}-{engine}-drawn"]:
            assert [{k: a[k] for k in alone[0]} for a in answers] == alone, engine


@pytest.mark.parametrize(
    "case",
    sample(itertools.product(FORMATS, ["fsdp2", "deepspeed"]), *(case[:2] for case in USUAL)),
)
def test_ranks_of_a_sharded_backbone_make_the_same_passes(found, case):
    """Though one of them has no prompt left in the second round, and some answers end early."""
    fmt, engine = case
    greedy = (fmt, engine, "greedy") in CASES
    first, second = found[f"{fmt}-{engine}-{'greedy' if greedy else 'drawn'}"]
    assert first[0]["passes"] == second[0]["passes"] > NEW


def test_the_source_may_be_a_checkpoint_or_the_exported_adapter(work, reference):
    config = quick_config(work, "data.eval=null", "method.targets=all-linear", *DECODING)
    folder = work / "runs/none"
    checkpoint = read_saved(folder).checkpoint
    adapter = with_overrides(config, [f"model.adapter={folder / 'adapter'}"])
    for source, own in ((checkpoint, config), (folder / "adapter", adapter)):
        model = open_saved_model(source, own, World())
        answers = generate(model, prompts(), own.generation)
        assert [answer.tokens for answer in answers] == reference["none"]


@pytest.mark.parametrize("engine", sample(ENGINES, "fsdp2"))
def test_a_runs_answers_do_not_depend_on_the_engine(tmp_path, engine):
    asked = [
        "run.steps=3", "generation.records=5", "generation.pattern=gsm8k", *DECODING,
        "generation.temperature=0.5", "optim.learning_rate=0.01",
    ]  # fmt: skip
    alone = quick_config(tmp_path, "run.name=alone", *asked)
    run(alone, World())
    spread = quick_config(tmp_path, "run.name=spread", f"engine.kind={engine}", *asked)
    for results in run_cases(tmp_path / "work", {"run": ("train", spread.model_dump())}).values():
        ok(results)
    first, second = (
        (config.run_folder / "predictions.jsonl").read_text() for config in (alone, spread)
    )
    assert first == second and len(first.splitlines()) == 5
