"""EleutherAI's harness on a trained run, beside multiple choice on the same records."""

import builtins
import json
import logging

import pytest

from launch.evaluate import main as evaluate
from tests.conftest import shared
from tests.helpers import quick_config, sample
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.run import run


def arc(tmp_path, *changes):
    folder = shared("data/commonsense/ARC-Easy")
    return quick_config(
        tmp_path, "task.kind=multiple_choice", f"data.train={folder / 'train.json'}",
        f"data.eval={folder / 'test.json'}", "data.train_records=24", "data.eval_records=24",
        "data.packing=false", "data.prompt=prompt", "run.steps=2", "optim.learning_rate=1e-2", *changes,
    )  # fmt: skip


def task_files(tmp_path):
    """ARC-Easy's task as the harness has it, on the same records in the hub's form."""
    rows = []
    for row in json.loads(shared("data/commonsense/ARC-Easy/test.json").read_text())[:24]:
        question, _, rest = row["instruction"].split(": ", 1)[1].partition("\n\n")
        listed = rest.split("\n\nAnswer format")[0]
        texts = [listed.split(f"Answer{n}: ")[1].split(f" Answer{n + 1}:")[0] for n in range(1, 5)
                 if f"Answer{n}: " in listed]  # fmt: skip
        rows.append({"question": question, "choices": texts, "label": int(row["answer"][-1]) - 1})
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "arc_local", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "arc.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "label", "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "arc.yaml").write_text(json.dumps(task))
    (folder / "gone.yaml").write_text(
        json.dumps({**task, "task": "gone", "dataset_kwargs": {"data_files": "nowhere.jsonl"}})
    )
    return folder


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("quantization", sample(["none", "nf4", "int8"], "nf4"))
def test_its_figures_are_those_of_multiple_choice(quantization, tmp_path, capsys, monkeypatch):
    """On the adapter and the quantised backbone that trained."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    logging.disable(logging.WARNING)
    config = arc(tmp_path, f"model.quantization={quantization}")
    run(config, World())
    folder = task_files(tmp_path)
    given = [str(config.run_folder), "--include-path", str(folder)]
    capsys.readouterr()
    assert evaluate([*given, "--tasks", "arc_local", "--batch-size", "5"]) == 0
    theirs = printed(capsys)["tasks"]["arc_local"]
    assert evaluate([str(config.run_folder)]) == 0
    ours = printed(capsys)
    assert theirs["acc,none"] == pytest.approx(ours["eval_accuracy"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["eval_accuracy_norm"])
    assert evaluate([*given, "--tasks", "arc_local", "--limit", "3"]) == 0
    assert printed(capsys)["tasks"]["arc_local"]["sample_len"] == 3
    with pytest.raises(UserError, match=r"arc_locale' given; .* did you mean 'arc_local'"):
        evaluate([*given, "--tasks", "arc_local,arc_locale"])
    with pytest.raises(UserError, match="--tasks: gone cannot be loaded"):
        evaluate([*given, "--tasks", "gone"])
    with pytest.raises(UserError, match="--include-path: nowhere given; accepted: a folder"):
        evaluate([str(config.run_folder), "--tasks", "arc_local", "--include-path", "nowhere"])


def test_what_is_refused(tmp_path, monkeypatch):
    """Without the extra, too."""
    config = arc(tmp_path, "run.steps=1", "data.eval=null")
    run(config, World())
    folder = str(config.run_folder)
    for flag, value in (("--limit", "0"), ("--num-fewshot", "-1"), ("--batch-size", "0")):
        with pytest.raises(UserError, match=f"{flag}: {value} given; accepted: "):
            evaluate([folder, "--tasks", "boolq", f"{flag}={value}"])
    with pytest.raises(UserError, match=r"--predictions: .*x given with --tasks, wh"):
        evaluate([folder, "--tasks", "boolq", "--predictions", str(tmp_path / "x")])
    honest = builtins.__import__

    def absent(name, *rest):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"harness cannot be imported .* pip install 'rankcast\[ev"):
        evaluate([folder, "--tasks", "boolq"])


def test_a_classifier_is_no_language_model(tmp_path):
    texts = [{"text": f"{n} is it", "label": "ab"[n % 2]} for n in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    config = quick_config(
        tmp_path, "task.kind=sequence_classification", f"data.train={tmp_path}/t.jsonl",
        "data.eval=null", "run.steps=1", "data.packing=false", "data.format=auto",
        "data.text=text", "data.label=label",
    )  # fmt: skip
    run(config, World())
    with pytest.raises(UserError, match=r"--tasks: given, but task\.kind=sequence_classif"):
        evaluate([str(config.run_folder), "--tasks", "boolq"])
