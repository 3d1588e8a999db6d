"""Records of every format as tokens, what becomes of unusable ones, and the cache."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from trainer.config.data_options import DataOptions
from trainer.data.cache import cache_key
from trainer.data.dataset import TokenDataset, schema
from trainer.data.sources import read_rows
from trainer.data.tokenise import prepare, read_labels
from trainer.errors import BadRecord, UserError
from trainer.tasks.base import Task
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.sequence_classification import (
    SequenceClassification,
    SequenceClassificationOptions,
)

EOS = 2
QA = [{"q": "two and two?", "a": "four"}, {"q": "", "a": "no question"}, {"q": "x", "a": "y z"}]


@pytest.fixture
def causal(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


@pytest.fixture
def chat(root) -> CausalLM:
    """A task whose tokenizer has a chat template (which adds its own special tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(root / "configs/quickstart/model")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
        "{{ '<' + m['role'] + '>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return CausalLM(CausalLMOptions(), tokenizer)


def classifier(tokenizer, labels: list | None = None) -> SequenceClassification:
    """For classes where `labels` are given, else for numbers."""
    problem = "classification" if labels is not None else "regression"
    task = SequenceClassification(SequenceClassificationOptions(problem=problem), tokenizer)
    task.learn_labels(labels or [])
    return task


def write(path: Path, content: str | bytes | list) -> Path:
    """Text and bytes as they are, a list of records as lines of JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tokens_of(path: Path, task: Task, limit: int | None = None, **keys: Any) -> TokenDataset:
    options = DataOptions(train=str(path), cache=str(path.parent / "cache"), **keys)
    return prepare(str(path), "train", limit, options, task)


def rows_of(path: Path, **keys: Any) -> list[tuple[int, dict | BadRecord]]:
    rows = read_rows(str(path), "train", DataOptions(train=str(path), **keys), None)
    return [(int(place.removeprefix(f"{path}:")), row) for place, row in rows]


def ids(task: Task, text: str) -> list[int]:
    return task.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(task: Task, *parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """(ids, mask) of (text, whether it is learned) parts, joined. A token of this byte-level
    tokenizer has a letter for each byte, and is learned if one of them is."""
    found = ids(task, "".join(text for text, _ in parts))
    learned = [is_learned for text, is_learned in parts for _ in text.encode()]
    mask, at = [], 0
    for token in task.tokenizer.convert_ids_to_tokens(found):
        width = 0 if token in task.tokenizer.all_special_tokens else len(token)
        width = width or len(token.encode())
        mask.append(max(learned[at : at + width]))
        at += width
    assert at == len(learned)
    return found, mask


def check(data: TokenDataset, task: Task, pairs: list[tuple[str, str]]) -> None:
    """The examples are prompt completion </s>, with the loss on completion and </s>."""
    assert len(data) == len(pairs)
    for index, (prompt, completion) in enumerate(pairs):
        found, mask = expected(task, (prompt, 0), (completion, 1))
        mask[0] = 0  # the first token is not predicted
        example = data[index]
        assert list(example.input_ids) == [*found, EOS]
        assert list(example.loss_mask) == [*mask, 1]
        assert example.weight == data.weights[index] == sum(mask) + 1
        assert data.lengths[index] == len(example.input_ids)
    assert data.counts.tokens == sum(data.lengths)


def stopped(path: Path, task: Task, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        tokens_of(path, task, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert not list((path.parent / "cache").glob("*")), "a failed run leaves nothing in the cache"
    return message


# --- file types: the same records from each


FILES = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in QA),
    "jsonl with BOM, CRLF and blank lines": "\ufeff"
    + "\r\n\r\n".join(json.dumps(row) for row in QA),
    "json": json.dumps(QA, indent=1),
    "json with BOM": "\ufeff" + json.dumps(QA),
    "json, an object a line": "\n" + "\n".join(map(json.dumps, QA)),
    "json, an object a line, BOM": "\ufeff" + "\n".join(map(json.dumps, QA)),
    "csv": "q,a\ntwo and two?,four\n,no question\nx,y z\n",
    "csv, quoted, CRLF": '"q","a"\r\n"two and two?","four"\r\n"","no question"\r\nx,"y z"\r\n',
    "csv with BOM": "\ufeffq,a\ntwo and two?,four\n,no question\nx,y z",
    "tsv": "q\ta\ntwo and two?\tfour\n\tno question\n\nx\ty z\n",
}


@pytest.mark.parametrize("name", FILES)
def test_text_files(tmp_path: Path, causal: CausalLM, name: str) -> None:
    path = write(tmp_path / f"data.{name.split()[0].strip(',')}", FILES[name])
    data = tokens_of(path, causal, prompt="q", completion="a")
    check(data, causal, [(row["q"], row["a"]) for row in QA])
    assert (data.counts.records, data.counts.used, data.counts.bad) == (3, 3, 0)


def test_tsv_without_header(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.tsv", "id1\ttwo?\tfour\nid2\tx\ty\n")
    data = tokens_of(path, causal, columns=["id", "q", "a"], prompt="q", completion="a")
    check(data, causal, [("two?", "four"), ("x", "y")])


def test_parquet(tmp_path: Path, causal: CausalLM) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(QA), path)
    check(
        tokens_of(path, causal, prompt="q", completion="a"), causal, [(r["q"], r["a"]) for r in QA]
    )


def test_quoting(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tsv", 'text\tn\n" open quote\t1\n"a ""b"" c"\t2\n')
    assert rows_of(path, quoting="none") == [
        (2, {"text": '" open quote', "n": "1"}),
        (3, {"text": '"a ""b"" c"', "n": "2"}),
    ]
    path = write(tmp_path / "data.csv", 'text,n\n"a ""b"", c",1\n"two\nlines",2\n')
    assert rows_of(path) == [
        (2, {"text": 'a "b", c', "n": "1"}),
        (4, {"text": "two\nlines", "n": "2"}),
    ]


def test_paragraphs_of_a_text_file(tmp_path: Path, causal: CausalLM) -> None:
    path = write(
        tmp_path / "data.txt", "\ufeff\nfirst line\nits second\n\n \t\n\r\nthe next\r\n\n\n"
    )
    data = tokens_of(path, causal)
    check(data, causal, [("", "first line\nits second"), ("", "the next")])


def test_only_the_first_records(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", [*QA, {"broken": 1}])
    data = tokens_of(path, causal, limit=2, prompt="q", completion="a")
    check(data, causal, [(row["q"], row["a"]) for row in QA[:2]])


# --- formats


def test_templates(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "why?", "topic": "art", "answer": 42}])
    data = tokens_of(path, causal, prompt="[{topic}] {question}\n", completion="= {answer}.")
    check(data, causal, [("[art] why?\n", "= 42.")])


def test_alpaca(tmp_path: Path, causal: CausalLM) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
    ]
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay h{}.\n\n### Response:\n"
    )
    pairs = [(with_input, "3"), (without.format("i"), "hi"), (without.format("o"), "ho")]
    path = write(tmp_path / "data.json", json.dumps(rows))
    for kind in ("auto", "alpaca"):
        check(tokens_of(path, causal, format=kind), causal, pairs)


def test_messages(tmp_path: Path, chat: CausalLM) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2 2"},
    ]
    data = tokens_of(write(tmp_path / "data.jsonl", [{"messages": turns}]), chat)
    pieces = [
        ("<system>Be brief.<user>one?<assistant>", 0),
        ("1</s>", 1),
        ("<user>two?<assistant>", 0),
        ("2 2</s>", 1),
    ]
    found, mask = expected(chat, *pieces)
    assert list(data[0].input_ids) == found  # and no further <s>, </s>
    assert list(data[0].loss_mask) == mask
    assert data[0].weight == sum(mask)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: no messages"),
        ("hello", "messages: a text that is no JSON; accepted: a list, or its JSON"),
        ({"role": "user"}, "messages holds a dict; accepted: a list"),
        ([{"role": "user", "content": "a"}], "messages: no assistant message"),
        ([{"role": "user"}], "messages[0]: no message with role and content"),
        (["a"], "messages[0]: no message with role and content"),
        (
            [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the chat template refuses it: no tools",
        ),
    ],
)
def test_messages_that_are_refused(tmp_path: Path, chat: CausalLM, messages, reason: str) -> None:
    path = write(tmp_path / "data.jsonl", [{"messages": messages}])
    assert f"{path}:1: {reason}" in stopped(path, chat)


def test_messages_need_a_chat_template(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    assert f"{path}:1: the tokenizer has no chat template" in stopped(path, causal)


def test_text(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", [{"body": "once upon", "id": 1}])
    check(tokens_of(path, causal, format="text", text="body"), causal, [("", "once upon")])
    assert tokens_of(path, causal, text="body")[0] == tokens_of(path, causal, text=["body"])[0]


def test_classification_of_one_text_and_of_pairs(tmp_path: Path, tokenizer) -> None:
    rows = [{"s": "good", "t": "fine", "y": "pos"}, {"s": "bad", "t": "", "y": "neg"}]
    path = write(tmp_path / "data.jsonl", rows)
    task = classifier(tokenizer, ["pos", "neg"])
    one = tokens_of(path, task, text="s", label="y")
    assert [list(one[i].input_ids) for i in (0, 1)] == [ids(task, "good"), ids(task, "bad")]
    assert [one[i].label for i in (0, 1)] == [1.0, 0.0]
    assert [one[i].weight for i in (0, 1)] == [1, 1]
    two = tokens_of(path, task, text=["s", "t"], label="y")
    assert list(two[0].input_ids) == ids(task, "good\nfine")  # this tokenizer has no separator


def test_regression(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "data.csv", "text,label\na,4.75\nb,-1e-3\nc,3\n")
    data = tokens_of(path, classifier(tokenizer))
    assert [data[i].label for i in range(3)] == list(data.labels) == [4.75, -0.001, 3.0]
    for label in ("high", "nan", "inf", ""):
        path = write(tmp_path / "bad.csv", f"text,label\na,1\nb,{label}\n")
        with pytest.raises(UserError) as caught:
            tokens_of(path, classifier(tokenizer))
        assert f"{path}:3: label {label!r}: no number" in str(caught.value)


def test_labels_of_the_training_data(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "a", "label": i} for i in (2, 0, 1.5)])
    options = DataOptions(train=str(path), train_records=2)
    assert [str(label) for label in read_labels(str(path), "train", options)] == ["2", "0"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "b"}, "no column 'label'; there are text"),
        ({"text": "b", "label": None}, "label is null"),
        ({"text": "b", "label": [1]}, "label holds a list; accepted: text"),
        ({"sentence": "b", "label": 1}, "no column 'text'; there are sentence, label"),
    ],
)
def test_records_without_a_label(tmp_path: Path, row: dict, reason: str) -> None:
    good = [{"text": "a", "label": 1}, {"text": "a", "label": 0}]
    path = write(tmp_path / "data.jsonl", [*good, row])
    options = DataOptions(train=str(path))
    with pytest.raises(UserError) as caught:
        read_labels(str(path), "train", options)
    assert f"{path}:3: {reason}" in str(caught.value)
    skip = DataOptions(train=str(path), on_bad_record="skip")
    assert [str(label) for label in read_labels(str(path), "train", skip)] == ["1", "0"]
    path = write(tmp_path / "data.jsonl", [row])
    with pytest.raises(UserError, match="no usable record"):
        read_labels(str(path), "train", skip)


# --- the loss mask and the length


def test_loss_on_everything(tmp_path: Path, tokenizer) -> None:
    task = CausalLM(CausalLMOptions(loss_on="all"), tokenizer)
    example = tokens_of(write(tmp_path / "d.jsonl", QA), task, prompt="q", completion="a")[0]
    assert list(example.loss_mask) == [0] + [1] * (len(example.input_ids) - 1)
    assert example.weight == len(example.input_ids) - 1


LONG = [
    {"prompt": "a b", "completion": "c"},
    {"prompt": "a b", "completion": "c d e f g h i j"},
    {"prompt": "x", "completion": "y"},
]


def test_truncation(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", LONG)
    whole = tokens_of(path, causal)
    assert max(whole.lengths) > 8
    data = tokens_of(path, causal, max_length=8)
    assert list(data[1].input_ids) == list(whole[1].input_ids)[:8]
    assert list(data[1].loss_mask) == list(whole[1].loss_mask)[:8]
    assert data[1].weight == sum(data[1].loss_mask) == 8 - len(ids(causal, "a b"))
    assert (data.counts.used, data.counts.truncated, data.counts.dropped) == (3, 1, 0)
    exact = tokens_of(path, causal, max_length=int(max(whole.lengths)))
    assert exact.counts.truncated == 0


def test_long_records_dropped(tmp_path: Path, causal: CausalLM) -> None:
    data = tokens_of(
        write(tmp_path / "data.jsonl", LONG), causal, max_length=8, on_long_record="drop"
    )
    check(data, causal, [("a b", "c"), ("x", "y")])
    assert (data.counts.records, data.counts.used, data.counts.dropped) == (3, 2, 1)
    assert "2 of 3 records" in str(data.counts)
    assert "0 truncated, 1 dropped, 0 bad" in str(data.counts)


def test_long_records_stop(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", LONG)
    message = stopped(path, causal, max_length=8, on_long_record="stop")
    assert f"{path}:2: longer than data.max_length (8 tokens)" in message
    assert "data.on_long_record=truncate or drop" in message


def test_prompt_that_leaves_no_room(tmp_path: Path, causal: CausalLM) -> None:
    path = write(
        tmp_path / "data.jsonl", [*LONG, {"prompt": "a b c d e f g h i", "completion": "j"}]
    )
    reason = f"{path}:4: the prompt alone fills data.max_length (8 tokens)"
    assert reason in stopped(path, causal, max_length=8)
    data = tokens_of(path, causal, max_length=8, on_bad_record="skip")
    assert (data.counts.used, data.counts.truncated, data.counts.bad) == (3, 1, 1)


def test_classification_is_cut_to_the_length(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "data.csv", "text,label\na b c d e f g h i j,1\nk,0\n")
    task = classifier(tokenizer, [0, 1])
    data = tokens_of(path, task, max_length=4)
    assert list(data[0].input_ids) == ids(task, "a b c d e f g h i j")[:4]
    assert data.counts.truncated == 1


# --- records and files that cannot be used

BAD_LINES = {
    "broken JSON": ('{"prompt": "a", ', "broken JSON (Expecting"),
    "not an object": ('["a"]', "a JSON list"),
    "missing column": ('{"prompt": "a", "x": 1}', "no column 'completion'; there are prompt, x"),
    "empty object": ("{}", "no column 'prompt'; there are none"),
    "null": ('{"prompt": "a", "completion": null}', "completion is null"),
    "nested": ('{"prompt": ["a"], "completion": "b"}', "prompt holds a list; accepted: text"),
    "huge number": ('{"prompt": ' + "1" * 5000 + ', "completion": "b"}', "broken JSON"),
    "nested too deep": ("[" * 100_000, "broken JSON"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_record(tmp_path: Path, causal: CausalLM, line: str, reason: str) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    path = write(tmp_path / "data.jsonl", good + "\n" + line + "\n" + good)
    message = stopped(path, causal)
    assert message.startswith(f"{path}:3: {reason}")
    assert "data.on_bad_record=skip" in message
    data = tokens_of(path, causal, on_bad_record="skip")
    check(data, causal, [("a", "b"), ("a", "b")])
    assert (data.counts.records, data.counts.used, data.counts.bad) == (3, 2, 1)


def test_a_list_among_lines_of_objects(tmp_path: Path, causal: CausalLM) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    path = write(tmp_path / "data.json", good + f"[{good.strip()}]")
    assert stopped(path, causal).startswith(f"{path}:2: a JSON list")


def test_rows_with_a_wrong_number_of_columns(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.csv", "prompt,completion\na,b\nc\nd,e,f\ng,h\n")
    assert f"{path}:3: 1 columns, expected 2" in stopped(path, causal)
    data = tokens_of(path, causal, on_bad_record="skip")
    check(data, causal, [("a", "b"), ("g", "h")])
    assert data.counts.bad == 2


def test_unseen_label(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "data.csv", "text,label\na,x\nb,z\n")
    message = stopped(path, classifier(tokenizer, ["x", "y"]))
    assert f"{path}:3: label 'z': not in the training data (x, y)" in message


BAD_FILES = {
    "empty": ("data.jsonl", "", "empty file"),
    "only blank lines": ("data.jsonl", "\n\n", "no records"),
    "only a header": ("data.csv", "prompt,completion\n", "no records"),
    "empty list": ("data.json", "[]", "no records"),
    "only spaces": ("data.txt", " \n\n ", "no records"),
    "broken JSON list": ("data.json", '[{"a": 1},\n {"a": 2\n]', "data.json:3: broken JSON"),
    "huge number": ("data.json", "1" * 5000, "broken JSON"),
    "nested too deep": ("data.json", "[" * 100_000, "broken JSON"),
    "JSON object": ("data.json", '{\n"a": 1\n}', "a JSON dict; accepted: a list of records, or an"),
    "JSON lists, a line each": (
        "data.json",
        '[{"a": 1}]\n[{"a": 2}]',
        "data.json:2: broken JSON (Extra data); accepted: one list of records, or an object a line",
    ),
    "JSON objects of several lines": ("data.json", '{\n"a": 1}\n{"a": 2}', "or an object a line"),
    "not UTF-8": ("data.jsonl", b'{"prompt": "a"}\n' * 40 + b"\xff\n", ":41: not UTF-8"),
    "no parquet": ("data.parquet", "words", "no parquet file"),
    "another type": ("data.xml", "<a/>", "not a data file; accepted: .json, .jsonl, .csv"),
    "nothing usable": ("data.jsonl", "{}\n[]\n", "no usable record (0 of 2 records"),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path: Path, causal: CausalLM, name: str, content, reason: str) -> None:
    path = write(tmp_path / name, content)
    message = stopped(path, causal, on_bad_record="skip")
    assert message.startswith(str(path))
    assert reason in message


def test_missing_file(tmp_path: Path, causal: CausalLM) -> None:
    assert "none.jsonl: no such file; accepted: a file (.json" in stopped(
        tmp_path / "none.jsonl", causal
    )
    assert "no data file in this folder; accepted: .json" in stopped(tmp_path, causal)


def test_cache_folder_that_cannot_be_made(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", LONG)
    options = DataOptions(train=str(path), cache=str(path / "cache"))  # below a file
    with pytest.raises(UserError, match=r"data\.cache: .*accepted: a folder to write into"):
        prepare(str(path), "train", None, options, causal)


# --- the cache


def files_in_cache(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in (folder / "cache").rglob("*")
        if file.is_file()
    }


def test_cache_is_used_again(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", [*LONG, {}])
    first = tokens_of(path, causal, max_length=8, on_bad_record="skip")
    written = files_in_cache(tmp_path)
    assert len(written) == 2
    again = tokens_of(path, causal, max_length=8, on_bad_record="skip", batch_size=64, packing=True)
    assert files_in_cache(tmp_path) == written
    assert again.counts == first.counts
    assert (again.counts.truncated, again.counts.bad) == (1, 1)
    assert [again[i] for i in range(3)] == [first[i] for i in range(3)]


def test_cache_is_left_when_anything_changes(tmp_path: Path, causal: CausalLM, chat) -> None:
    path = write(tmp_path / "data.jsonl", LONG)
    tokens_of(path, causal)
    seen = len(files_in_cache(tmp_path))

    def is_new(task: Task, **keys: Any) -> bool:
        nonlocal seen
        tokens_of(path, task, **keys)
        before, seen = seen, len(files_in_cache(tmp_path))
        return seen == before + 2

    everything = CausalLM(CausalLMOptions(loss_on="all"), causal.tokenizer)
    assert is_new(causal, max_length=9)
    assert is_new(causal, prompt="completion", completion="prompt")
    assert is_new(causal, limit=1)
    assert is_new(everything)
    assert is_new(chat)  # another chat template
    assert not is_new(causal)
    stat = path.stat()
    write(path, path.read_text().replace('"x"', '"z"'))  # same length, and the same time:
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_new(causal)
    check(tokens_of(path, causal), causal, [("a b", "c"), ("a b", "c d e f g h i j"), ("z", "y")])


def test_a_cache_entry_that_lost_a_file_is_made_again(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", LONG)
    for _ in range(3):
        digest = tokens_of(path, causal).digest
        for file in (tmp_path / "cache").glob("*/counts.json"):
            file.unlink()
    assert tokens_of(path, causal).digest == digest


def test_an_option_that_comes_later_makes_no_other_data(tmp_path: Path, causal: CausalLM) -> None:
    class Later(DataOptions):
        other: int = 3

    path = str(write(tmp_path / "data.jsonl", LONG))

    def key(options: DataOptions) -> str:
        return cache_key(path, "train", None, options, causal)

    assert key(Later(train=path)) == key(DataOptions(train=path))
    assert key(Later(train=path, other=4)) != key(DataOptions(train=path))


def test_a_data_set_is_the_digest_of_its_examples(tmp_path: Path, causal: CausalLM) -> None:
    """However they are cut into chunks; every column counts."""
    data = tokens_of(write(tmp_path / "data.jsonl", LONG), causal)
    columns = {
        "input_ids": [list(data[i].input_ids) for i in range(len(data))],
        "loss_mask": [list(data[i].loss_mask) for i in range(len(data))],
        "token_type_ids": [[] for _ in range(len(data))],
        "label": list(data.labels), "weight": list(data.weights), "record": list(data.records),
        "reference": [""] * len(data), "image": [b""] * len(data),
    }  # fmt: skip

    def digest(changed: dict[str, Any], size: int = 10) -> str:
        table = pa.table({**columns, **changed}, schema=schema())
        chunks = [table.slice(i, size).combine_chunks() for i in range(0, len(table), size)]
        return TokenDataset(pa.concat_tables(chunks), data.counts).digest

    assert digest({}) == digest({}, size=1) == data.digest
    for name, values in columns.items():
        more: Any = {list: [1], str: "x", bytes: b"x"}.get(type(values[0]), 1)
        other = [values[0] + more, *values[1:]]
        assert digest({name: other}) != data.digest, name
    ids = columns["input_ids"]
    moved = [[*ids[0], ids[1][0]], ids[1][1:], *ids[2:]]
    assert digest({"input_ids": moved}) != data.digest


def test_many_records_stay_on_disk(tmp_path: Path, causal: CausalLM) -> None:
    """More than one chunk, the first without a usable record; not copied when opened."""
    rows = [{"bad": 1}] * 1000
    rows += [{"prompt": f"{i}", "completion": f"{i} times one is {i}"} for i in range(2400)]
    path = write(tmp_path / "data.jsonl", rows)
    tokens_of(path, causal, on_bad_record="skip")
    before = pa.total_allocated_bytes()
    data = tokens_of(path, causal, on_bad_record="skip")
    numbers = 16 * len(data)  # label, weight and record of each
    assert data.counts.tokens * 5 > 5 * numbers  # bytes of ids and mask
    assert pa.total_allocated_bytes() - before <= numbers
    assert (len(data), data.counts.bad) == (2400, 1000)
    for i in (0, 1, 999, 1000, 1001, 1999, 2000, 2399):
        found = [*ids(causal, f"{i}{i} times one is {i}"), EOS]
        assert list(data[i].input_ids) == found
        assert data.lengths[i] == len(found)
        assert data.weights[i] == sum(data[i].loss_mask)


# --- real data

REAL_ROWS = {
    "glue/CoLA/train.tsv": (8551, {"columns": ["source", "label", "star", "sentence"]}),
    "glue/CoLA/dev.tsv": (1043, {"columns": ["source", "label", "star", "sentence"]}),
    "glue/MRPC/train.tsv": (3668, {"quoting": "none"}),
    "glue/MRPC/dev.tsv": (408, {"quoting": "none"}),
    "glue/RTE/train.tsv": (2490, {"quoting": "none"}),
    "glue/RTE/dev.tsv": (277, {"quoting": "none"}),
    "glue/STS-B/train.tsv": (5749, {"quoting": "none"}),
    "glue/STS-B/dev.tsv": (1500, {"quoting": "none"}),
    "glue/SST-2/train.tsv": (67349, {"quoting": "none"}),
    "glue/SST-2/dev.tsv": (872, {"quoting": "none"}),
    "gsm8k/train.jsonl": (7473, {}),
    "gsm8k/test.jsonl": (1319, {}),
    "commonsense/boolq/test.json": (3270, {}),
    "commonsense/ARC-Challenge/train.json": (1119, {}),
    "books/valid.txt": (2001, {}),
}


@pytest.mark.parametrize(("name", "count", "keys"), [(n, *v) for n, v in REAL_ROWS.items()])
def test_real_files_are_read_whole(shared_data: Path, name: str, count: int, keys: dict) -> None:
    rows = [row for _, row in rows_of(shared_data / name, **keys)]
    assert not [row for row in rows if isinstance(row, BadRecord)]
    assert len(rows) == count


REAL_CLASSES = {
    "CoLA": (1043, ["0", "1"], "sentence", {"columns": ["source", "label", "star", "sentence"]}),
    "MRPC": (408, ["0", "1"], ["#1 String", "#2 String"], {"label": "Quality"}),
    "RTE": (277, ["entailment", "not_entailment"], ["sentence1", "sentence2"], {}),
    "SST-2": (872, ["0", "1"], "sentence", {}),
}


@pytest.mark.parametrize(
    ("name", "count", "labels", "text", "keys"), [(n, *v) for n, v in REAL_CLASSES.items()]
)
def test_real_classification(
    shared_data: Path, tmp_path: Path, tokenizer, name, count, labels, text, keys
) -> None:
    source = str(shared_data / "glue" / name / "dev.tsv")
    keys = {"quoting": "none", "max_length": 256, "text": text, **keys}
    options = DataOptions(train=source, cache=str(tmp_path), **keys)
    found = read_labels(source, "train", options)
    task = classifier(tokenizer, found)
    assert task.labels == labels
    data = prepare(source, "train", None, options, task)
    assert (len(data), data.counts.records, data.counts.bad) == (count, count, 0)
    assert [labels[int(label)] for label in data.labels] == found
    first = next(row for _, row in read_rows(source, "train", options, 1))
    columns = [text] if isinstance(text, str) else text
    whole = ids(task, "\n".join(first[column] for column in columns))
    assert list(data[0].input_ids) == whole[:256]


def test_real_regression(shared_data: Path, tmp_path: Path, tokenizer) -> None:
    source = str(shared_data / "glue/STS-B/dev.tsv")
    options = DataOptions(
        train=source,
        cache=str(tmp_path),
        quoting="none",
        text=["sentence1", "sentence2"],
        label="score",
    )
    data = prepare(source, "train", None, options, classifier(tokenizer))
    assert len(data) == 1500
    assert list(data.labels[:2]) == [5.0, 4.75]
    assert (data.labels.min(), data.labels.max()) == (0.0, 5.0)


def test_real_language_data(shared_data: Path, tmp_path: Path, causal: CausalLM) -> None:
    def used(name: str, **keys: Any) -> TokenDataset:
        source = str(shared_data / name)
        options = DataOptions(train=source, cache=str(tmp_path), max_length=2048, **keys)
        return prepare(source, "train", 300, options, causal)

    answers = used("gsm8k/test.jsonl", prompt="{question}\n", completion="answer")
    row = json.loads((shared_data / "gsm8k/test.jsonl").read_text().splitlines()[299])
    learned = [*ids(causal, row["answer"]), EOS]
    assert list(answers[299].input_ids) == [*ids(causal, row["question"] + "\n"), *learned]
    assert answers[299].weight == len(learned)
    options = json.loads((shared_data / "commonsense/openbookqa/test.json").read_text())
    choices = used("commonsense/openbookqa/test.json")
    assert choices[0].weight == 1 + len(ids(causal, options[0]["output"]))
    assert len(choices) == len(used("books/valid.txt")) == 300
