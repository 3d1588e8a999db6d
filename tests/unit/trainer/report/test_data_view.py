"""What `rankcast data` shows: tokens with the learned ones marked, lengths, formats, packing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch.data import main
from tests.helpers import QUICKSTART
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import KINDS
from trainer.report.data_view import as_tokens, histogram
from trainer.tasks.base import Example


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_said_is_shown_and_what_is_learned_marked(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer("Hello world again, 日本 é", add_special_tokens=False)["input_ids"]
    half = len(ids) // 2
    mask = [0] * half + [1] * (len(ids) - half)
    plain = as_tokens(Example(ids, mask), tokenizer, colour=False).plain
    assert plain.count("[[") == plain.count("]]") == 1 and plain.endswith("]]")
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert re.sub(r"¦|\[\[|\]\]", "", plain) == whole
    assert plain.count("¦") <= len(ids) - 1
    coloured = as_tokens(Example(ids, mask), tokenizer, colour=True)
    assert "[[" not in coloured.plain
    learned = "".join(
        coloured.plain[span.start : span.end]
        for span in coloured.spans
        if "green" in str(span.style)
    )
    before, _, after = plain.partition("[[")
    assert learned == re.sub("¦|]]", "", after) and before


def test_bars_count_every_length() -> None:
    lengths = np.array([1, 5, 5, 17, 100, 100, 100])
    lines = list(histogram(lengths))
    assert sum(int(line.split()[3]) for line in lines) == len(lengths)
    assert lines[-1].strip().startswith("91 – 100")
    assert next(iter(histogram(np.array([1])))).split()[:4] == ["1", "–", "1", "1"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"question": "One?\nTwo?", "answer": "1 2"}
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(chat) + "\n") * 5)
    given = [f"data.train={path}", "data.eval=null", "run.eval_every=0", "run.eval_at_start=false"]
    given += [f"data.cache={tmp_path}/cache", "log.progress=plain", "data.packing=true"]
    assert main([str(QUICKSTART), "--records", "2", *given]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"tokenising {path}\ntrain     5 of 5 records")
    assert "formats   5 prompt_completion" in out and "tokens    shortest" in out
    assert re.search(r"packing   \d rows of 256 tokens, \d+\.\d% filled", out)
    assert out.count("[[") == 2 and "record 2:" in out and "record 3:" not in out
    assert "</s>]]" in out and "↵" in out
    assert main([str(QUICKSTART), "--records", "0", *given]) == 0
    again = capsys.readouterr().out
    assert "tokenising" not in again and "record 1" not in again  # from the cache


def test_wrong_choices_are_not_shown_as_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "One?", "choices": ["1", "2"], "label": 0}) + "\n")
    given = [f"data.train={path}", "data.eval=null", "run.eval_every=0", "run.eval_at_start=false"]
    given += [f"data.cache={tmp_path}/cache", "task.kind=multiple_choice", "data.prompt=question"]
    assert main([str(QUICKSTART), *given]) == 0
    _, right, wrong = capsys.readouterr().out.split("record 1:")
    assert "[[ ¦1]]" in right and "¦2" in wrong
    assert " 0 learned" in wrong and "[[" not in wrong


def test_sources_of_a_mixture_have_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "One?", "answer": "1"}) + "\n")
    one = f"{{train: {path}, weight: 1}}"
    given = [f"data.mixture=[{one}, {one}]", "data.train=null", "data.eval=null"]
    given += ["run.eval_every=0", "run.eval_at_start=false", f"data.cache={tmp_path}/cache"]
    assert main([str(QUICKSTART), "--records", "0", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    for number in (1, 2):
        at = lines.index(f"source {number}: {path}, 50.0%")
        assert lines[at + 1].startswith("          1 of 1 records")
