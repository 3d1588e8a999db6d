"""The best checkpoint and early stopping do not depend on the number of ranks, nor on where a run
was interrupted."""

import json
import os

import pytest
from safetensors.torch import load_file

from tests.helpers import ROOT, quick_config
from tests.world.cases import ok, run_cases
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.records.jsonl import read_metrics
from trainer.run.run import run


def configuration(tmp, name, *more):
    """Its losses go down, up, down at step 5, and up again."""
    return quick_config(
        tmp, f"run.name={name}", "run.steps=12", "run.eval_every=1", "run.keep_best=eval_loss",
        "run.patience=3", "optim.learning_rate=0.02", "optim.schedule=constant", "method.rank=2",
        "optim.shard_state=true", "checkpoint.every=1", "checkpoint.keep=99", *more,
    )  # fmt: skip


def judged(folder) -> list[tuple[int, float, int]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [
        (one["step"], one["eval_loss"], one["best_step"]) for one in lines if "eval_loss" in one
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("best")
    whole = configuration(tmp, "whole")
    run(whole, World())
    cases = {}
    for name, step, engine in (("mid", 3, "fsdp2"), ("missed", 5, "ddp")):
        config = configuration(tmp, name, f"engine.kind={engine}").model_dump()
        cases[name] = ("go_on", {"config": config, "source": str(whole.run_folder), "step": step})
    cases["missed"][1]["missed"] = True
    for case in run_cases(tmp / "work", cases).values():
        ok(case)
    return tmp / "runs"


def test_the_run_is_one_in_which_the_best_changes(runs):
    steps = [(step, best) for step, _, best in judged(runs / "whole")]
    assert steps == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5), (8, 5)]


@pytest.mark.parametrize("name", ["mid", "missed"])
def test_other_ranks_go_on_with_the_best_so_far(runs, name):
    expected, found = judged(runs / "whole"), judged(runs / name)
    assert [(step, best) for step, _, best in found] == [(s, b) for s, _, b in expected]
    assert [loss for _, loss, _ in found] == pytest.approx([x for _, x, _ in expected], rel=1e-3)
    newest = store.newest(runs / name / "checkpoints")
    best = json.loads((newest / "state.json").read_text())["best"]
    assert (newest.name, best["step"]) == ("step-00000008", 5)
    exported = load_file(runs / name / "adapter/adapter_model.safetensors")
    own = load_file(runs / "whole/adapter/adapter_model.safetensors")
    assert exported.keys() == own.keys()
    assert all((exported[key] - own[key]).abs().max() < 1e-3 for key in own)
    assert "step 5, the best by eval_loss" in (runs / name / "README.md").read_text()
