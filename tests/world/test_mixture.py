"""A mixture of real data sets under sharding engines: the losses of one process, also resumed."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import shared
from tests.helpers import kept_steps, losses, quick_config, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train_only
from trainer.config.config import Config
from trainer.distributed.world import World

STEPS, SAVED = 4, 2
ENGINES = ("fsdp2", "deepspeed")


def configuration(tmp: Path, engine: str, name: str, *more: str) -> Config:
    data = shared("data")
    mixture = [
        {
            "train": f"{data}/gsm8k/train.jsonl",
            "weight": 3,
            "prompt": "{question}\n",
            "completion": "answer",
        },
        {
            "train": f"{data}/commonsense/*/test.json",
            "weight": 2,
            "format": "prompt_completion",
            "prompt": "{answer}: ",
            "completion": "output",
        },
        {"train": f"{data}/books", "weight": 1},
    ]
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", f"run.steps={STEPS}",
        f"data.mixture={json.dumps(mixture)}", "data.train=null", "data.prompt=prompt",
        "data.completion=completion", "data.train_records=40", "data.eval=0.1",
        "data.eval_records=null", "run.eval_every=2", "data.max_length=128", "data.packing=true", "data.on_bad_record=skip",
        "data.batch_size=4", "data.micro_batch_size=1", "checkpoint.every=2", "checkpoint.keep=9",
        f"engine.kind={engine}", "method.kind=lora", *more,
    )  # fmt: skip


def evaluated(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_losses_of_a_mixture_on_two_ranks_and_resumed_on_one(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    train_only(World(), configuration(tmp_path, "single", "alone").model_dump())
    cases = {
        engine: ("train_only", configuration(tmp_path, engine, engine).model_dump())
        for engine in ENGINES
    }
    for ranks in run_cases(tmp_path / "work", cases).values():
        ok(ranks)
    runs = tmp_path / "runs"
    for engine in ENGINES:
        again = configuration(tmp_path, "single", f"{engine}-resumed")
        cut_run(runs / engine, again.run_folder, SAVED)
        train_only(World(), again.model_dump())
        assert kept_steps(again.run_folder, SAVED) == kept_steps(runs / engine, SAVED)
    expected, scores = losses(runs / "alone"), evaluated(runs / "alone")
    assert len(expected) == STEPS and len(scores) == 2
    for name in (*ENGINES, *(f"{engine}-resumed" for engine in ENGINES)):
        assert losses(runs / name) == pytest.approx(expected, rel=1e-5), name
        assert evaluated(runs / name) == pytest.approx(scores, rel=1e-5), name
