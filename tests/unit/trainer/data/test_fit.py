"""Records that are longer than `data.max_length`: split, without the beginning of their prompt, or
dropped."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import fuzz
from tests.unit.trainer.data.test_dataset import EOS, ids, stopped, tokens_of, write
from trainer.config.data_options import DataOptions
from trainer.config.validation import validate
from trainer.data.fit import pieces, without_beginning
from trainer.errors import UserError
from trainer.tasks.base import Example
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

BOS = 1
TEXTS = [{"text": "a b c d e f g h i j k l m"}, {"text": "x y"}, {"text": "k l m n o p q r s t u"}]


@pytest.fixture
def causal(tokenizer: Any) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


def learned(example: Example) -> list[int]:
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    return [token for token, is_learned in pairs if is_learned]


@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_texts_are_split(tmp_path: Path, causal: CausalLM, overlap: int) -> None:
    path = write(tmp_path / "data.jsonl", TEXTS)
    data = tokens_of(path, causal, max_length=8, on_long_record="split", overlap=overlap)
    assert (data.counts.used, data.counts.split, data.counts.truncated) == (3, 2, 0)
    assert data.counts.examples == len(data) == len(data.records) > 3
    assert f"3 of 3 records, {len(data)} examples, " in str(data.counts)
    assert "(0 truncated, 2 split, 0 dropped, 0 bad)" in str(data.counts)
    for record, row in enumerate(TEXTS):
        whole = [*ids(causal, row["text"]), EOS]
        parts = [data[i] for i in range(len(data)) if data.records[i] == record]
        joined = [
            token for n, part in enumerate(parts) for token in part.input_ids[overlap * (n > 0) :]
        ]
        assert joined == whole
        assert all(
            len(part.input_ids) <= 8 and part.weight == sum(part.loss_mask) for part in parts
        )
        if overlap:  # every token but the first is learned, once
            assert [token for part in parts for token in learned(part)] == whole[1:]
        for before, part in itertools.pairwise(parts):
            assert (
                list(part.input_ids)[:overlap]
                == list(before.input_ids)[len(before.input_ids) - overlap :]
            )


@fuzz(usual=100)
@given(size=st.integers(1, 60), length=st.integers(2, 20), data=st.data())
def test_pieces_are_the_text(size: int, length: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    whole = Example(list(range(size)), [0, *[1] * (size - 1)])
    found = list(pieces(whole, length, overlap))
    tokens = [token for part in found for token in learned(part)]
    assert tokens == sorted(set(tokens))
    if overlap:
        assert tokens == list(range(1, size))
    else:
        assert set(range(size)) - set(tokens) == set(range(0, size, length))
    assert all(len(part.input_ids) == length for part in found[:-1])


def test_only_texts_are_split(tmp_path: Path, causal: CausalLM) -> None:
    """Others are trained as they are, if they fit."""
    rows = [*TEXTS, {"prompt": "a", "completion": "b"}]
    data = tokens_of(
        write(tmp_path / "d.jsonl", rows), causal, max_length=8, on_long_record="split"
    )
    assert data.counts.used == 4
    path = write(tmp_path / "data.jsonl", [*rows, {"prompt": "a b c", "completion": "d e f g h i"}])
    (tmp_path / "cache").rename(tmp_path / "other")
    message = stopped(path, causal, max_length=8, on_long_record="split")
    assert f"{path}:5: longer than data.max_length (8 tokens), and of format prompt_comp" in message


PROMPTS = [
    {"prompt": "a b c d e f g h i j", "completion": "k"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a b", "completion": "c d e f g h i j k l"},
]


@pytest.mark.parametrize("add_bos", ["auto", True])
def test_the_beginning_of_a_prompt_is_cut(tmp_path: Path, causal: CausalLM, add_bos: Any) -> None:
    path = write(tmp_path / "data.jsonl", PROMPTS)
    data = tokens_of(path, causal, max_length=8, truncate="prompt", add_bos=add_bos)
    assert (data.counts.used, data.counts.truncated, data.counts.bad) == (3, 2, 0)
    begin = [BOS] * (add_bos is True)
    prompt, completion = ids(causal, "a b c d e f g h i j"), [*ids(causal, "k"), EOS]
    room = 8 - len(begin) - len(completion)
    assert list(data[0].input_ids) == [*begin, *prompt[-room:], *completion]
    assert learned(data[0]) == completion
    whole = [*ids(causal, "c d e f g h i j k l"), EOS]
    last = begin or ids(causal, "a b")[-1:]
    assert list(data[2].input_ids) == [*last, *whole[:7]]
    assert learned(data[2]) == whole[:7]


@fuzz(usual=100)
@given(
    prompt=st.integers(1, 20),
    completion=st.integers(1, 20),
    length=st.integers(2, 30),
    begin=st.booleans(),
)
def test_what_is_cut(prompt: int, completion: int, length: int, begin: bool) -> None:
    whole = Example(list(range(prompt + completion)), [0] * prompt + [1] * completion)
    found = without_beginning(whole, length, 0 if begin else None)
    assert len(found.input_ids) == min(length, prompt + completion)
    assert found.truncated == (prompt + completion > length)
    assert learned(found) == list(range(prompt, prompt + min(completion, length - 1)))
    kept = [token for token in found.input_ids if token < prompt]
    if begin:
        assert kept.pop(0) == 0
    assert kept == list(range(prompt - len(kept), prompt))


def test_a_prompt_that_is_too_long_is_dropped_and_counted(tmp_path: Path, causal: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", PROMPTS)
    data = tokens_of(path, causal, max_length=8, on_long_record="drop")
    assert (data.counts.used, data.counts.dropped, data.counts.bad) == (1, 2, 0)
    (tmp_path / "cache").rename(tmp_path / "other")
    message = stopped(path, causal, max_length=8, on_long_record="stop")
    assert f"{path}:1: longer than data.max_length (8 tokens)" in message
    message = stopped(path, causal, max_length=8)
    assert f"{path}:1: the prompt alone fills" in message and "data.truncate=prompt" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"on_long_record": "split", "format": "messages"},
            "split given with data.format=messages",
        ),
        ({"overlap": 3}, "data.overlap: 3 given with data.on_long_record=truncate"),
        ({"overlap": 8, "on_long_record": "split"}, "data.overlap: 8 given; accepted: less than"),
        ({"truncate": "prompt", "on_long_record": "drop"}, "data.truncate: prompt given with"),
    ],
)
def test_what_does_not_go_together(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate("data", {"train": "x", "max_length": 8, **keys}, DataOptions)
