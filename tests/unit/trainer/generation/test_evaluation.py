"""Runs that answer held-out records: their scores, lines, tables, and what is refused at start."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import evaluate
from tests.helpers import quick_config
from tests.tiny_models import tiny_model
from trainer.checkpoint.saved import read_saved
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.records.answers import answers_table
from trainer.run.run import run
from trainer.training.evaluation import evaluate_saved

ASKED = [
    "generation.records=6", "generation.max_new_tokens=24", "generation.batch_size=4",
    "generation.pattern=gsm8k", "generation.shown=2", "data.eval_records=8",
    "optim.learning_rate=0.01", "run.name=a",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):

    folder = tmp_path_factory.mktemp("answered")
    run(
        quick_config(folder, "run.steps=6", "run.eval_every=3", "log.tensorboard=true", *ASKED),
        World(),
    )
    return folder


def answers_of(folder) -> list[dict]:
    lines = (folder / "runs/a/predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metrics_of(folder) -> list[dict]:
    lines = (folder / "runs/a/metrics.jsonl").read_text().splitlines()
    return [found for line in lines if "eval_loss" in (found := json.loads(line))]


def test_answers_are_transformers_own_on_the_merged_model(finished, tokenizer, root):
    export_run(
        finished / "runs/a",
        finished / "merged",
        World(),
        what="merged",
        measure=False,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(finished / "merged", dtype=torch.float32)
    rows = (root / "configs/quickstart/eval.jsonl").read_text().splitlines()[:6]
    answers = answers_of(finished)
    assert [answer["record"] for answer in answers] == list(range(6))
    for row, answer in zip(map(json.loads, rows), answers, strict=True):
        assert answer["prompt"] == row["question"] + "\n"
        assert answer["reference"] == row["answer"] and answer["step"] == 6
        ids = tokenizer(row["question"] + "\n", return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=24, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_scores_are_logged_and_those_of_the_lines(finished):
    lines, answers = metrics_of(finished), answers_of(finished)
    assert [line["step"] for line in lines] == [3, 6]
    for key in ("exact_match", "ended"):
        mean = sum(answer[key] for answer in answers) / len(answers)
        assert lines[-1][f"eval_{key}"] == pytest.approx(mean)


def test_a_saved_run_is_scored_alike(finished, capsys):
    config = quick_config(finished, *ASKED)
    found = evaluate_saved(config, World(), read_saved(finished / "runs/a"))
    last = metrics_of(finished)[-1]
    assert {key: last[key] for key in last if key.startswith("eval_")} == pytest.approx(found)
    evaluate.main([str(finished / "runs/a"), "generation.records=2"])
    assert "eval_exact_match" in json.loads(capsys.readouterr().out.splitlines()[-1])
    with pytest.raises(UserError, match=r"Z.z. is not found in its answer .record 1 of data.eval"):
        evaluate.main([str(finished / "runs/a"), "generation.records=2", "generation.pattern=Z(z)"])


def test_the_first_answers_are_shown(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table = answers_table(answers_of(finished), 2)
    assert len(table.splitlines()) == 4
    assert table in (finished / "runs/a/README.md").read_text()
    board = EventAccumulator(str(finished / "runs/a/tensorboard"), size_guidance={"tensors": 0})
    shown = board.Reload().Tensors("eval/answers/text_summary")
    assert [event.step for event in shown] == [3, 6]
    assert shown[-1].tensor_proto.string_val[0].decode() == table


def test_a_table_holds_any_text():
    answer = {"record": 0, "prompt": "a|b\n<b>" + "x" * 500, "text": "`*y*`", "reference": None,
              "exact_match": 1.0, "tokens": 1, "ended": True}  # fmt: skip
    *_, row = answers_table([answer], 5).splitlines()
    cells = row.split(" | ")
    assert len(cells) == 5 and cells[1].startswith("… xxx") and len(cells[1]) < 410
    assert cells[2] == "&#96;&#42;y&#42;&#96;"
    assert answers_table([{"step": 3, "record": 4}], 5) == answers_table([], 5) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["generation.pattern=Z(z)"], "Z.z. is not found in its answer .record 1 of data.eval"),
        (["data.format=text", "data.text=question"], "plain text, which has no prompts"),
        (["data.max_length=48", "data.on_bad_record=skip"], "within data.max_length"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_the_start(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(quick_config(tmp_path, *ASKED, *changes), World())


def test_answers_beyond_the_models_positions_are_refused_at_the_start(tmp_path, tokenizer):
    tiny_model("gpt2", n_positions=1024).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = quick_config(
        tmp_path, *ASKED, f"model.id={tmp_path}/gpt2", "method.targets=all-linear",
        "generation.max_new_tokens=1000", "run.steps=1",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"max_new_tokens: 1000 given with a prompt .* for 1024"):
        run(config, World())
    assert not (config.run_folder / "metrics.jsonl").exists()
