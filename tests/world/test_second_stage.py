"""Second stages on two ranks: they start where the first, in one process, ended."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config, save_random_model
from tests.world.cases import ok, run_cases
from trainer.distributed.world import World
from trainer.run.run import run

CASES = {  # (method of the first stage, of the second, engine)
    "goes-on": ("lora", ["method.kind=lora", "method.rank=4"], "fsdp2"),
    "stays": ("lora", ["method.kind=lora", "method.rank=2"], "deepspeed"),
    "splits": ("pissa", ["method.kind=lora", "method.rank=2"], "fsdp2"),
    "decides": ("weightlora", ["method.kind=weightlora", "method.warmup_steps=2"], "deepspeed"),
}
FIRST = {
    "lora": CASES["goes-on"][1],
    "pissa": ["method.kind=pissa", "method.rank=3"],
    "weightlora": CASES["decides"][1],
}


def configured(tmp, name, *overrides):
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", "model.quantization=nf4",
        "data.max_length=64", "data.train_records=24", "data.eval_records=8", "data.batch_size=4",
        "data.on_bad_record=skip", "optim.learning_rate=2e-2", "run.eval_at_start=true",
        "run.verify=auto", *overrides,
    )  # fmt: skip


def lines(config):
    return list(map(json.loads, (config.run_folder / "metrics.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("stages")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    firsts = {name: configured(tmp, name, *method) for name, method in FIRST.items()}
    for config in firsts.values():
        run(config, World())
    seconds = {
        name: configured(
            tmp, name, f"engine.kind={engine}", f"model.adapter={firsts[first].run_folder}", *method
        )
        for name, (first, method, engine) in CASES.items()
    }
    cases = {name: ("train", config.model_dump()) for name, config in seconds.items()}
    return firsts, seconds, run_cases(tmp / "work", cases)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_start_where_one_process_ended(case, outcome, tmp_path):
    firsts, seconds, results = outcome
    ok(results[case])
    first, config = firsts[CASES[case][0]], seconds[case]
    ended = [line["eval_loss"] for line in lines(first) if "eval_loss" in line][-1]
    assert lines(config)[0]["eval_loss"] == pytest.approx(ended, rel=1e-5)
