"""Rows of added tokens are the same under every engine, format and number of processes."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import ALL, ROOT, losses, quick_config, sample, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train_only
from trainer.checkpoint import store
from trainer.config.config import Config
from trainer.distributed.world import World

STEPS, SAVED = 6, 3
NEW = ["<|new|>", "<|end|>"]
TABLES = {"tied": True, "untied": False}
"""With 512 rows, as many as the tokenizer has tokens: both grow to 514."""
ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
EVERY = list(itertools.product(ENGINES, ["none", "nf4"], TABLES))
USUAL = [("fsdp2", "nf4", "untied"), ("deepspeed", "none", "tied")]
CHOSEN = EVERY if ALL else USUAL
TEXTS = [("The cat <|new|>", " sat<|end|>"), ("A red<|new|> apple", " fell."), ("Two", "<|end|>")]


def configuration(tmp: Path, engine: str, fmt: str, tables: str, name: str) -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/{tables}", f"run.name={name}", f"run.steps={STEPS}",
        f"model.added_tokens={json.dumps(NEW)}", f"data.train={tmp}/records.jsonl",
        "data.eval=null", "data.batch_size=3", "data.micro_batch_size=1", "checkpoint.every=3",
        f"model.quantization={fmt}", f"engine.kind={engine}", "run.verify=auto",
        "optim.learning_rate=1e-2", "optim.weight_decay=0.1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Whole runs in one process and in two, then each of both resumed as the other."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("tokens")
    for name, tied in TABLES.items():
        save_random_model(
            tmp / name, "llama", AutoModelForCausalLM, tie_word_embeddings=tied, vocab_size=512
        )
    rows = [{"question": question, "answer": answer} for question, answer in TEXTS * 4]
    (tmp / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for fmt, tables in dict.fromkeys(case[1:] for case in CHOSEN):
        alone = configuration(tmp, "single", fmt, tables, f"single-{fmt}-{tables}")
        train_only(World(), alone.model_dump())
    cases = {}
    for engine, fmt, tables in CHOSEN:
        name = f"{engine}-{fmt}-{tables}"
        cases[name] = "train_only", configuration(tmp, engine, fmt, tables, name).model_dump()
        spread = configuration(tmp, engine, fmt, tables, f"{name}-from-single")
        source = str(tmp / "runs" / f"single-{fmt}-{tables}")
        argument = {"config": spread.model_dump(), "source": source, "step": SAVED}
        cases[f"{name}-from-single"] = "resume", argument
    for results in run_cases(tmp / "work", cases).values():
        ok(results)
    for engine, fmt, tables in CHOSEN:
        name = f"{engine}-{fmt}-{tables}"
        alone = configuration(tmp, "single", fmt, tables, f"single-from-{name}")
        cut_run(tmp / "runs" / name, alone.run_folder, SAVED)
        train_only(World(), alone.model_dump())
    return tmp / "runs"


@pytest.mark.parametrize("case", sample(EVERY, *USUAL))
def test_two_processes_train_the_rows_of_one(runs, case):
    _, fmt, tables = case
    name, single = "-".join(case), f"single-{fmt}-{tables}"
    expected, rows = losses(runs / single), trained_rows(runs / single)
    assert expected[-1] < 0.5 * expected[0]
    assert len(rows) == (1 if tables == "tied" else 2)
    for run in (name, f"{name}-from-single", f"single-from-{name}"):
        assert losses(runs / run) == pytest.approx(expected, rel=1e-5)
        for table, values in trained_rows(runs / run).items():
            assert values.shape == (2, 64)
            torch.testing.assert_close(values, rows[table], rtol=0, atol=1e-5)


def trained_rows(run: Path) -> dict[str, torch.Tensor]:
    """The rows in a run's last checkpoint by table."""
    tensors = store.read_tensors(store.newest(run / "checkpoints"))
    return {n: t for n, t in tensors.items() if n.startswith("rows/")}
