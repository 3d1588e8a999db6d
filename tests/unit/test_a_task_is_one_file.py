"""CONTRIBUTING's task: its file and its line in the registry are all that it takes to train."""

import json

import pytest

from tests.helpers import losses, quick_config
from tests.unit.one_file import example, registered, write_module
from trainer.checkpoint.saved import read_saved
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run, saved_config
from trainer.records.jsonl import read_metrics
from trainer.run.run import run
from trainer.tasks.registry import TASKS
from trainer.training.evaluation import evaluate_saved


@pytest.fixture
def task(tmp_path, monkeypatch) -> list[str]:
    """The task of CONTRIBUTING.md, registered; overrides that train it."""
    file, line = example("A task")
    write_module(tmp_path, "toy_tasks", "label_token", file)
    monkeypatch.syspath_prepend(tmp_path)
    kind, entry = registered(line, "trainer.tasks", "toy_tasks")
    monkeypatch.setitem(TASKS, kind, entry)
    rows = [
        {"text": f"{'up' if i % 3 else 'down'} {i}", "label": "yes" if i % 3 else "no"}
        for i in range(40)
    ]
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"task.kind={kind}", f"data.train={records}", f"data.eval={records}", "data.packing=false",
        "run.steps=8", "optim.learning_rate=1e-2",
    ]  # fmt: skip


def test_it_trains_and_scores(tmp_path, task):
    config = quick_config(tmp_path, *task, "run.name=toy")
    run(config, World())
    trained = losses(config.run_folder)
    assert trained[-1] < trained[0]
    scores = read_metrics(config.run_folder / "metrics.jsonl")[-1]
    assert 0 <= scores["eval_accuracy"] <= 1 and "eval_perplexity" not in scores
    saved = read_saved(config.run_folder)
    assert saved.state["labels"] == {"labels": ["no", "yes"]}
    again = evaluate_saved(saved_config(saved.state), World(), saved)
    assert again["eval_accuracy"] == scores["eval_accuracy"]
    export_run(config.run_folder, tmp_path / "out", World())
    exported = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert exported["task_type"] == "CAUSAL_LM"


def test_what_its_options_say_is_checked(tmp_path, task):
    with pytest.raises(UserError, match=r"data.packing: true given with task.kind=label_token"):
        quick_config(tmp_path, *task, "data.packing=true")
    with pytest.raises(UserError, match=r"data.format: text given with task.kind=label_token; "):
        quick_config(tmp_path, *task, "data.format=text")
    with pytest.raises(UserError, match=r"task.kind: 'x' given; accepted: .*, label_token"):
        quick_config(tmp_path, *task, "task.kind=x")
