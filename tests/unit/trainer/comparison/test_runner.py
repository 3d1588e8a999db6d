"""Comparisons from end to end: runs, their results, a table, and going on where one stopped."""

import json
import multiprocessing

import pytest

from tests.helpers import QUICKSTART
from trainer.comparison.plan import Comparison
from trainer.comparison.runner import Limits, compare
from trainer.comparison.worker import make_run
from trainer.config.config import load_config
from trainer.errors import UserError

SECONDS = ("steps_seconds", "evaluation_seconds")


def comparison(tmp_path, **changes) -> Comparison:
    keys = {
        "base": str(QUICKSTART),
        "overrides": [
            "engine.kind=single", f"data.cache={tmp_path}/cache", "run.steps=2", "run.eval_every=0",
            "run.eval_at_start=false", "log.progress=none", "log.tensorboard=false", "log.every=1",
            "data.train_records=40", "data.eval_records=8", "data.batch_size=4", "run.verify=off",
            "data.micro_batch_size=4", "checkpoint.every=0", "model.quantization=none",
        ],
        "learning_rates": [4e-3], "seeds": [0, 1], "lora_ranks": [8],
        "methods": {"lora": [], "wide": ["method.rank=16", "method.alpha=32"]},
    }  # fmt: skip
    return Comparison.model_validate(keys | changes)


@pytest.fixture
def in_forks(monkeypatch):
    """Workers that need no imports."""
    forks = multiprocessing.get_context("fork")
    monkeypatch.setattr("trainer.comparison.runner.multiprocessing.get_context", lambda kind: forks)


def stored(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").open()]


def test_an_arm_is_run_in_every_comparison_before_the_next_arm(tmp_path, in_forks):
    parts = [
        (comparison(tmp_path, seeds=[seed], match_parameters=False), tmp_path / str(seed))
        for seed in (0, 1)
    ]
    said = []
    compare(parts, report=lambda line: said.append(json.loads(line)))
    order = [(one["method"], one["seed"]) for one in said]
    assert order == [("lora", 0), ("lora", 1), ("wide", 0), ("wide", 1)]


def test_every_run_is_made_once_and_described(tmp_path, in_forks):
    out, said = tmp_path / "out", []
    job = comparison(tmp_path, seeds=[0])
    (results,) = compare([(job, out)], report=said.append)
    # lora, wide, and lora r=16, which is the same as wide
    assert len(results) == len(said) == 2 and stored(out) == results
    assert not any("error" in result for result in results)
    lora, wide = (next(r for r in results if r["method"] == m) for m in ("lora", "wide"))
    assert wide["active_parameters"] == 2 * lora["active_parameters"]
    for result in results:
        counts = {result[f"{kind}_parameters"] for kind in ("touched", "exported", "active")}
        assert len(counts) == 1
        records = result["records"]
        assert len(records["id"]) == 8
        mean = sum(records["loss"]) / sum(records["weight"])
        assert mean == pytest.approx(result["eval_loss"], rel=1e-5)
        assert "first step" in result["start_seconds"] and result["evaluation_seconds"] > 0
        parts = [sum(result["start_seconds"].values()), *map(result.get, SECONDS)]
        assert min(parts) > 0 and sum(parts) < result["seconds"]
        folder = out / "runs" / result["run"]
        assert not (folder / "adapter").exists() and not list((folder / "checkpoints").iterdir())
    text = (out / "table.md").read_text()
    assert "| wide |" in text and (out / "figure.png").is_file()

    again: list[str] = []
    assert compare([(job, out)], report=again.append) == [results] and again == []


def test_changed_failed_and_unfinished_runs_are_made_again(tmp_path, in_forks):
    out, said = tmp_path / "out", []
    job = comparison(tmp_path, seeds=[0], methods={"lora": []})
    (first,) = compare([(job, out)], report=said.append)
    longer = job.model_copy(update={"overrides": [*job.overrides, "run.steps=3"]})
    assert compare([(longer, out)], Limits(minutes=0), said.append) == [[]]
    compare([(longer, out)], report=said.append)
    assert len(said) == 2 and len({r["config"] for r in stored(out)}) == 2
    # Another comparison's results are neither in the table nor lost.
    assert "1 of 1" in (out / "table.md").read_text()

    failed = {k: first[0][k] for k in ("method", "learning_rate", "seed", "config", "code")}
    failed["error"] = "OSError: no space left"
    lines = json.dumps(failed) + "\n" + json.dumps(first[0])[:40]  # the other was cut off
    (out / "results.jsonl").write_text(lines + "\n")
    assert any((out / "runs").iterdir())
    (third,) = compare([(job, out)], report=said.append)
    assert len(said) == 3 and third[0]["eval_loss"] == first[0]["eval_loss"]

    other = {**first[0], "code": "other"}
    (out / "results.jsonl").write_text(json.dumps(other) + "\n")
    compare([(job, out)], Limits(minutes=0, any_code=True), said.append)
    assert (
        "1 results of other code, used" in said[-1] and "1 of 1" in (out / "table.md").read_text()
    )
    compare([(job, out)], Limits(minutes=0), said.append)
    assert "not used" in said[-1] and "so far: lora" in (out / "table.md").read_text()


def test_a_run_that_diverges_or_fails_is_a_result_with_an_error(tmp_path):
    given = comparison(tmp_path).overrides
    identity = {"seed": 0, "selects": False}
    config = load_config(
        QUICKSTART,
        [
            *given,
            f"run.dir={tmp_path}/runs",
            "run.name=a",
            "run.steps=14",
            "optim.learning_rate=1e4",
        ],
    )
    result = make_run(identity, config)
    assert result["diverged"] and "Diverged" in result["error"] and "eval_loss" not in result
    config = load_config(
        QUICKSTART, [*given, f"run.dir={tmp_path}/runs", "run.name=b", "data.train=none.jsonl"]
    )
    result = make_run(identity, config)
    assert "UserError" in result["error"] and "diverged" not in result


def test_a_comparison_whose_first_runs_all_fail_ends(tmp_path, in_forks):
    """All 20 would; before, they did. The table is written."""
    given = comparison(tmp_path).overrides
    job = comparison(
        tmp_path, seeds=list(range(20)), methods={"lora": []},
        overrides=[*given, "data.train=none.jsonl"],
    )  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"the first 8 runs or more all failed with .* none\.jsonl"):
        compare([(job, out)], report=lambda line: None)
    assert len(stored(out)) == 8 and "0 of 20" in (out / "table.md").read_text()


def test_an_arm_replays_the_last_allocation_of_another(tmp_path, in_forks):
    budget = ["method.kind=lelora", "method.coordinates=delta", "method.ranks=[0, 2, 4]",
              "method.rank=4", "method.policy.budget=2", "method.policy.within=layer",
              "run.steps=3"]  # fmt: skip
    fixed = ["method.policy.freeze_after=0"]
    methods = {
        "found": [*budget, "method.policy.freeze_after=1"],
        "replayed": {"like": "found", "overrides": fixed, "replays": "found"},
        "permuted": {"like": "replayed", "replays": "found", "permuted": True},
        "random": {"like": "replayed", "replays": "found", "permuted": "any"},
    }  # fmt: skip
    out, said = tmp_path / "out", []
    job = comparison(tmp_path, methods=methods)
    (results,) = compare([(job, out)], report=said.append)
    assert not any("error" in result for result in results) and len(results) == 8
    runs = {(r["method"], r["seed"]): r for r in results}
    for seed in (0, 1):
        found, same, other, any_shape = of = [runs[arm, seed] for arm in methods]
        ranks = [
            json.loads((out / "runs" / r["run"] / "allocation.jsonl").read_text().splitlines()[-1])
            for r in of
        ]
        assert ranks[0]["ranks"] == ranks[1]["ranks"] and ranks[1]["step"] == 0
        for exchanged in ranks[2:]:
            assert sorted(exchanged["ranks"].values()) == sorted(ranks[0]["ranks"].values())
        assert any_shape["active_parameters"] == pytest.approx(same["active_parameters"], rel=0.01)
        units = json.loads((out / "runs" / found["run"] / "units.json").read_text())
        for layer in {unit["layer"] for unit in units}:
            sizes = {u["name"]: u["in_features"] + u["out_features"]
                     for u in units if u["layer"] == layer}  # fmt: skip
            spent = sum(ranks[0]["ranks"][name] * size for name, size in sizes.items())
            assert 0 <= 2 * sum(sizes.values()) - spent < 2 * max(sizes.values())
        assert found["active_parameters"] == same["active_parameters"]
        assert other["active_parameters"] == same["mean_active_parameters"]
        assert found["distinct_actions"] >= 1 and found["entropy_rank"] >= 0
    again: list[str] = []
    assert compare([(job, out)], report=again.append) == [results] and again == []
