"""Keys that nothing reads are told, each in a line, and those that are read are not."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers import quick_config
from trainer.config.config import Config
from trainer.data.dataset import Counts
from trainer.run.without_effect import on_keys


class Tokenised:
    """What `on_keys` asks of a tokenised data set."""

    def __init__(self, *formats: str, truncated: int = 0):
        self.counts = Counts(truncated=truncated, formats=dict.fromkeys(formats, 1))


def config(tmp: Path, task: str, *given: str) -> Config:
    for name in ("train", "test"):
        (tmp / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        (tmp / f"{name}.csv").write_text("text\n")
    (tmp / "LARGE.TSV.GZ").touch()
    (tmp / "lines").mkdir()
    (tmp / "lines/all.txt").touch()
    return quick_config(
        tmp, f"task.kind={task}", "data.packing=false", "data.prompt=prompt",
        "data.completion=completion", f"data.train={tmp}/train.jsonl",
        f"data.eval={tmp}/test.jsonl", *given,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "kind", "given", "told"),
    [
        ("image_classification", "images", ["data.text=a"], "data.text: 'a' .* format images"),
        ("image_classification", "images", ["data.image=a", "data.label=b"], None),
        ("sequence_classification", "classification", ["data.choices=a"], "data.choices: 'a' "),
        ("sequence_classification", "classification", ["data.turns=last"], "data.turns: 'last' "),
        ("sequence_classification", "classification", ["data.text=[a, b]", "data.label=c"], None),
        ("question_answering", "question_answering", ["data.prompt=a"], "data.prompt: 'a' has no"),
        ("multiple_choice", "commonsense", ["data.label=a"], "data.label: 'a' .* commonsense"),
        ("multiple_choice", "multiple_choice", ["data.answers=names"], "data.answers: 'names' "),
        ("multiple_choice", "multiple_choice", ["data.blank=_", "data.prompt=q"], None),
        ("causal_lm", "messages", ["data.prompt=a"], "data.prompt: 'a' .* format messages"),
        ("causal_lm", "prompt_completion", ["data.prompt=a", "data.turns=last"], None),
        ("causal_lm", "text", ["data.subset=a"], "data.subset: 'a' .*: no source is .* the hub"),
        ("causal_lm", "text", ["data.revision=a"], "data.revision: 'a' .*no source"),
        ("causal_lm", "text", ["data.subset=a", "data.eval=owner/name"], None),
        ("causal_lm", "text", ["data.train_split=a"], "data.train_split: 'a' .*: files have no"),
        ("causal_lm", "text", ["data.eval_split=a"], "data.eval_split: 'a' .*: files have no"),
        ("causal_lm", "text", ["data.eval_split=a", "data.eval=owner/name"], None),
        ("causal_lm", "text", ["data.columns=[text]"], r"data.columns: \['text'\] .* csv or tsv"),
        ("causal_lm", "text", ["data.columns=[text]", "data.eval={tmp}/test.csv"], None),
        ("causal_lm", "text", ["data.columns=[text]", "data.eval={tmp}/tes?.c*"], None),
        ("causal_lm", "text", ["data.columns=[text]", "data.eval={tmp}/LARGE.TSV.GZ"], None),
        ("causal_lm", "text", ["data.columns=[text]", "data.eval={tmp}/lines"], "data.columns: "),
        ("causal_lm", "text", ["data.eval={tmp}/train.jsonl"], "data.eval: .*/train.jsonl is tr"),
        (
            "causal_lm",
            "text",
            ["data.eval={{a: {tmp}/test.jsonl, b: {tmp}/train.jsonl}}"],
            "data.eval.b: .*/train.jsonl is trained on too",
        ),
        (
            "causal_lm",
            "text",
            ["data.eval=left_out", "data.leave_out=4", "data.eval_records=2"],
            "data.eval_records: 2 has no effect: data.leave_out says",
        ),
        ("causal_lm", "text", ["generation.pattern=gsm8k"], "generation.pattern: no effect on e"),
        ("causal_lm", "text", ["log.record_losses=true"], None),
        ("multiple_choice", "commonsense", ["log.record_losses=true"], "log.record_losses: no eff"),
    ],
)
def test_a_key_that_nothing_reads_is_told(task, kind, given, told, tmp_path):
    settings = config(tmp_path, task, *(one.format(tmp=tmp_path) for one in given))
    lines = on_keys(settings, Tokenised(kind), {"": Tokenised(kind)})
    if told is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.search(told, line)


def test_keys_of_a_mixture_are_read_by_any_of_its_sources(tmp_path):
    sources = [
        f"{{train: {tmp_path}/train.jsonl, weight: 1}}",
        f"{{train: {tmp_path}/train.csv, weight: 1, columns: [text], label: b}}",
    ]
    mixture = f"data.mixture=[{', '.join(sources)}]"
    settings = config(tmp_path, "causal_lm", "data.train=null", mixture)
    (line,) = on_keys(settings, Tokenised("text", "prompt_completion"), {})
    assert (
        line == "data.label: 'b' has no effect: the records are of format prompt_completion, text"
    )


def test_answers_that_are_compared_with_cut_ones(tmp_path):
    settings = config(tmp_path, "causal_lm", "generation.records=2")
    assert on_keys(settings, Tokenised(truncated=1), {"": Tokenised()}) == []
    (line,) = on_keys(settings, Tokenised(), {"": Tokenised(truncated=3)})
    assert line.startswith("generation.records: 3 of the records are cut to data.max_length")
