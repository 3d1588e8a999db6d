"""Comparisons: rates chosen on records left out, seeds, a table, and going on where one stopped."""

import json
import multiprocessing

import pytest

from tests.helpers import QUICKSTART
from trainer.errors import UserError
from trainer.run.comparison import Comparison, choose, compare, read_comparison, table


def comparison(tmp_path, **changes) -> Comparison:
    return Comparison(
        base=str(QUICKSTART),
        overrides=[
            "engine.kind=single", f"data.cache={tmp_path}/cache", "run.steps=2", "run.eval_every=0",
            "run.eval_at_start=false", "log.progress=none", "log.tensorboard=false", "log.every=1",
            "data.train_records=40", "data.eval_records=8", "data.batch_size=4",
            "data.micro_batch_size=4", "checkpoint.every=0", "model.quantization=none",
        ],
        learning_rates=[1e-4, 1e-2],
        selection=["run.seed=100", "data.leave_out=8", "data.eval=left_out"],
        seeds=[0, 1],
        methods={"lora": [], "wide": ["method.rank=16"]},
        **changes,
    )  # fmt: skip


def test_every_run_is_done_once_and_described(tmp_path):
    said: list[str] = []
    job = comparison(tmp_path)
    returned = compare(job, tmp_path / "out", 1, said.append)
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert len(results) == len(said) == 2 * 2 + 2 * 2 and returned == results
    assert not any("error" in result for result in results)
    selected = [r for r in results if r["seed"] is None]
    for method in ("lora", "wide"):
        best = min((r for r in selected if r["method"] == method), key=lambda r: r["eval_loss"])
        runs = [r for r in results if r["method"] == method and r["seed"] is not None]
        assert {r["seed"] for r in runs} == {0, 1}
        assert {r["learning_rate"] for r in runs} == {best["learning_rate"]}
    wide, lora = (
        next(r["trainable_parameters"] for r in results if r["method"] == m)
        for m in ("wide", "lora")
    )
    assert wide == 2 * lora
    text = (tmp_path / "out/table.md").read_text()
    assert text == table(job, results) and text.count("\n") == 4

    again: list[str] = []
    assert len(compare(job, tmp_path / "out", 1, again.append)) == 8 and again == []


def test_changed_failed_and_unfinished_runs_are_run_again(tmp_path, monkeypatch):
    forks = multiprocessing.get_context("fork")  # workers that need no imports
    monkeypatch.setattr("trainer.run.comparison.multiprocessing.get_context", lambda kind: forks)
    job = comparison(tmp_path).model_copy(update={"learning_rates": [1e-3], "seeds": [0]})
    first = compare(job, tmp_path / "out", 1, lambda line: None)
    kept = tmp_path / "out/results.jsonl"

    longer = job.model_copy(update={"overrides": [*job.overrides, "run.steps=3"]})
    said: list[str] = []
    second = compare(longer, tmp_path / "out", 1, said.append)
    assert len(said) == 2 and {r["config"] for r in first}.isdisjoint(r["config"] for r in second)
    # Another comparison's results are neither in the table nor lost.
    assert compare(job, tmp_path / "out", 1, said.append) == first and len(said) == 2

    lines = [json.loads(line) for line in kept.open()][:2]
    lines[0] = {key: lines[0][key] for key in ("method", "learning_rate", "seed", "config")}
    lines[0] |= {"error": "OSError: no space left"}
    kept.write_text(json.dumps(lines[0]) + "\n")  # one failed, the other was cut off
    assert any((tmp_path / "out/runs").iterdir())
    third = compare(job, tmp_path / "out", 1, said.append)
    assert len(said) == 4 and not any("error" in r for r in third)
    assert [r["eval_loss"] for r in third] == [r["eval_loss"] for r in first]


def result(method, seed, rate=1e-3, **more):
    return {"method": method, "seed": seed, "learning_rate": rate, **more}


def test_scores_choose_by_their_own_direction(tmp_path):
    runs = [
        result("lora", None, 1e-4, eval_loss=2.0, eval_accuracy=0.9),
        result("lora", None, 1e-2, eval_loss=1.0, eval_accuracy=0.5),
        result("lora", 0, 1e-2, eval_loss=0.1, eval_accuracy=0.1),  # no selection run
    ]
    assert choose(runs, "lora", comparison(tmp_path)) == 1e-2
    assert choose(runs, "lora", comparison(tmp_path, score="eval_accuracy")) == 1e-4
    with pytest.raises(UserError, match="wide: no selection run"):
        choose(runs, "wide", comparison(tmp_path))


def test_a_run_that_failed_shows_in_the_table(tmp_path):
    more = {"trainable_parameters": 10, "mean_active_parameters": 5.0}
    runs = [
        result("lora", 0, eval_loss=1.0, **more),
        result("lora", 1, eval_loss=3.0, **more),
        result("wide", 0, error="UserError: x"),
    ]
    lines = table(comparison(tmp_path), runs).splitlines()
    assert lines[2] == "| lora | 2.0000 ± 1.4142 | 0.001 | 10 | 5 | 2 |"
    assert "no run ended" in lines[3] and "0 of 2" in lines[3]


@pytest.mark.parametrize("text", ["", "[1]", "base: x\nsedes: [1]\n"])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        read_comparison(tmp_path / "c.yaml")
    assert "accepted:" in str(refusal.value) and "\n" not in str(refusal.value)
