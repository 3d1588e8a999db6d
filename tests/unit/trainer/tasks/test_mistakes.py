"""What users get wrong about their tasks: one line that names the key or the column, what was given
and what is accepted. Mistakes about images and windows stand in the tests of their tasks."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.helpers import TINY, quick_config, save_random_model
from trainer.config.data_options import DataOptions
from trainer.data.sources import read_rows
from trainer.data.tokenise import prepare, read_labels
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.session import open_data, open_session
from trainer.tasks.options import SequenceClassificationOptions
from trainer.tasks.sequence_classification import SequenceClassification

KINDS = {
    "text": "causal_lm", "class": "sequence_classification", "choice": "multiple_choice",
    "answer": "question_answering", "target": "sequence_to_sequence",
    "image": "image_classification",
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("class", ["data.label=null"], "data.label: null given; accepted: string"),
        ("class", ["data.text=null"], "data.text: null given; accepted: string or a list of str"),
        ("image", ["data.image=null"], "data.image: null given; accepted: string"),
        ("text", ["data.prompt=null"], "data.prompt: null given; accepted: string"),
        ("target", ["data.completion=3"], "data.completion: 3 given; accepted: string; quotes"),
        ("choice", ["data.choices=[]"], r"data.choices: \[\] given; accepted: two or more"),
        ("choice", ["data.choices=[a]"], r"data.choices: \['a'\] given; accepted: two or more"),
        ("choice", ["data.choice_texts=[a, a]"], "data.choice_texts: .* accepted: .* different"),
        ("choice", ["data.choice_labels=['1']"], "data.choice_labels: .* accepted: two or more"),
        ("choice", ["data.choice_texts=[no, yes]"], "choice_texts.0: false given; .*; quotes make"),
        ("class", ["data.text=[a, b, c]"], "data.text: .* accepted: one or two columns"),
        ("class", ["task.stride=3"], "task.stride: unknown key; accepted: kind, problem"),
        ("answer", ["data.format=text"], "data.format: text given with task.kind=question_answ"),
        ("class", ["run.keep_best=eval_f2", "run.eval_every=1"], "'eval_f2' given; .* eval_f1"),
        ("class", ["run.keep_best=f1", "run.eval_every=1"], "keep_best: 'f1' given; .* eval_f1"),
        (
            "class",
            ["task.problem=regression", "run.keep_best=eval_accuracy", "run.eval_every=1"],
            "run.keep_best: 'eval_accuracy' given; accepted: eval_loss, eval_pearson",
        ),
        ("class", ["run.patience=2"], "run.patience: 2 given without run.keep_best"),
        (
            "class",
            ["run.patience=2", "run.keep_best=eval_loss"],
            "run.keep_best: eval_loss given without data.eval and run.eval_every",
        ),
        ("class", ["data.eval=null", "run.eval_every=1"], "run.eval_every: 1 given without data.e"),
        ("class", ["generation.records=2"], "generation.records: 2 .* generates no text"),
        ("target", ["generation.scores=[rouge9]"], "'rouge9' given; .* did you mean 'rouge'"),
        ("answer", ["task.null_threshold=2"], "task.null_threshold: 2.* with task.no_answer=false"),
        ("choice", ["task.likelihood=per_byte"], "task.likelihood: per_byte given with task.train"),
    ],
)
def test_a_key(task, given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        quick_config(tmp_path, f"task.kind={KINDS[task]}", "data.packing=false", *given)


def file_of(tmp_path: Path, *rows: dict) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


CHOICE = {"prompt": "Is it?", "choices": ["yes", "no"], "label": 1}
PLAIN = {"text": "a", "label": 0}


@pytest.mark.parametrize(
    ("task", "row", "given", "message"),
    [
        (
            "choice",
            CHOICE,
            ["data.choices=options"],
            "1: no column 'options'; there are prompt, ch",
        ),
        ("choice", CHOICE, ["data.label=gold"], "1: no column 'gold'; there are prompt, choices"),
        ("choice", CHOICE | {"label": "C"}, [], "1: label is 'C'; accepted: 0, 1, or a choice"),
        (
            "choice",
            CHOICE | {"choices": ["yes"], "label": 0},
            [],
            "1: 1 choices; accepted: two or more",
        ),
        ("choice", CHOICE | {"choices": ["yes", ""]}, [], "1: choice 2 of 2 has no text"),
        (
            "choice",
            CHOICE | {"choices": ["2", "3", "1"], "label": "1"},
            [],
            r"label is '1', which is choice number 1 from 0 \('3'\) and the text of another; acc",
        ),
        ("choice", CHOICE, ["data.blank=_"], "1: nothing to score: no text behind a blank '_'"),
        ("class", PLAIN, ["data.text=sentence"], "1: no column 'sentence'; there are text, label"),
        ("class", PLAIN, ["data.label=gold"], "1: no column 'gold'; there are text, label"),
        ("class", PLAIN | {"label": None}, [], "1: label is null"),
        ("class", PLAIN | {"label": [0]}, [], "1: label holds a list; accepted: text"),
        ("class", PLAIN, [], "data.label: one label only in the training data"),
        ("class", PLAIN | {"label": "x"}, ["task.problem=regression"], "1: label 'x': no number"),
        ("target", {"prompt": "a", "completion": ""}, [], "1: .* the completion is empty"),
        ("target", {"prompt": "a"}, [], "1: no column 'completion'; there are prompt"),
        ("target", {"prompt": "a", "completion": "b"}, ["data.prompt='{x}'"], "1: no column 'x'"),
    ],
)
def test_a_record(task, row, given, message, tmp_path):
    config = quick_config(
        tmp_path, f"task.kind={KINDS[task]}", "data.packing=false", "data.prompt=prompt",
        "data.completion=completion", f"data.train={file_of(tmp_path, row, row)}",
        "data.eval=null", f"model.id={TINY}", *given,
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        open_data(config, World())


def test_an_evaluation_of_which_nothing_is_left(tmp_path):
    """Labels that the training data do not have, and bad records left out."""
    config = quick_config(
        tmp_path, "task.kind=sequence_classification", "data.packing=false",
        "data.on_bad_record=skip", "data.eval=null",
        f"data.train={file_of(tmp_path, {'text': 'a', 'label': 'c'})}",
    )  # fmt: skip
    task = SequenceClassification(
        SequenceClassificationOptions(), AutoTokenizer.from_pretrained(TINY)
    )
    task.learn_labels(["a", "b"])
    with pytest.raises(
        UserError, match=r"no usable record \(0 of 1 .*1 bad\)\); accepted: .*=stop"
    ):
        prepare(config.data.train, "test", None, config.data, task)


def test_labels_are_shown():
    """Spaces among them, and numbers that were to be predicted."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    task = SequenceClassification(SequenceClassificationOptions(), tokenizer)
    task.learn_labels(["1", "0", "1 ", "0"])
    assert task.remarks() == ["3 labels: '0', '1', '1 '"]
    task.learn_labels([str(number / 2) for number in range(12)])
    (line,) = task.remarks()
    assert line.startswith("12 labels: '0.0', '0.5'") and "'4.0'" in line and "…" in line
    assert line.endswith("each of one record (numbers to predict: task.problem=regression)")
    assert SequenceClassification(SequenceClassificationOptions(), tokenizer).remarks() == []


@pytest.mark.parametrize(
    ("kind", "auto", "task", "message"),
    [
        ("t5", AutoModelForSeq2SeqLM, "text", "causal_lm given, but transformers has no ModelForC"),
        ("bert", AutoModel, "choice", "multiple_choice given, but BertLMHeadModel is built as an"),
        ("llama", None, "target", "sequence_to_sequence given, but llama has no encoder"),
    ],
)
def test_a_model_of_another_task(kind, auto, task, message, tmp_path):
    folder = save_random_model(tmp_path / "model", kind, auto)
    row = CHOICE if task == "choice" else {"prompt": "a", "completion": "b"}
    config = quick_config(
        tmp_path, f"model.id={folder}", f"task.kind={KINDS[task]}", "data.packing=false",
        f"data.train={file_of(tmp_path, *[row] * 8)}", "data.eval=null", "data.prompt=prompt",
        "data.completion=completion",
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        open_session(config, World())


def test_a_split_that_a_folder_of_images_does_not_have(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        (tmp_path / "images" / split / "cat/1.png").write_bytes(b"")
    options = DataOptions(train="x", format="images")
    rows = read_rows(str(tmp_path / "images"), "validation", options, None)
    with pytest.raises(UserError, match="images: no split 'validation'; accepted: test, train"):
        next(iter(rows))
    assert read_labels(str(tmp_path / "images"), "test", options, "images") == ["cat"]
