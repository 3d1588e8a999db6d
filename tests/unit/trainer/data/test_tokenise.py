"""Tokenising: the same bytes whatever the number of processes and of interruptions."""

import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer

from tests.helpers import TINY, thorough
from tests.unit.trainer.data.chat_templates import CHATML
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import KINDS, slow_bpe
from trainer.config.data_options import DataOptions
from trainer.data import tokenise
from trainer.data.cache import lock
from trainer.data.dataset import TOKENS, TokenDataset
from trainer.data.encode import Encoder
from trainer.data.parts import JOURNAL
from trainer.data.tokenise import prepare
from trainer.data.workers import Workers
from trainer.errors import UserError
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.sequence_classification import (
    SequenceClassification,
    SequenceClassificationOptions,
)

ROWS = [{"prompt": f"{n}?", "completion": "x " * (n % 7 + 1)} for n in range(95)]


class Stopped(BaseException):
    """As KeyboardInterrupt."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_RECORDS", 10)


@pytest.fixture
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


@pytest.fixture
def chat() -> CausalLM:
    tokenizer = with_template(AutoTokenizer.from_pretrained(TINY))
    return CausalLM(CausalLMOptions(), tokenizer)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens_of(path: Path, task: Any, cache: str = "cache", **keys: Any) -> TokenDataset:
    check = keys.pop("check", lambda: None)
    options = DataOptions(train=str(path), cache=str(path.parent / cache), **keys)
    return prepare(str(path), "train", None, options, task, check=check)


def stored(data: TokenDataset, path: Path, cache: str = "cache") -> bytes:
    assert [entry.name for entry in (path.parent / cache).iterdir()] == [data.key]
    return (path.parent / cache / data.key / TOKENS).read_bytes()


class Parts:
    """Stops when it has seen so many chunks encoded; counts the rows."""

    def __init__(self, stop_after: int = 10**9):
        self.rows, self.left, self.encode = 0, stop_after, Encoder.__call__

    def __enter__(self) -> "Parts":
        def encode(work: Encoder, chunk: Any, *tick: Any) -> Any:
            if self.left == 0:
                raise Stopped
            self.left -= 1
            self.rows += len(chunk)
            return self.encode(work, chunk, *tick)

        self.patch = patch.object(Encoder, "__call__", encode)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


def test_an_interrupted_start_goes_on(tmp_path: Path, task: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    whole = tokens_of(path, task)
    expected = stored(whole, path)
    for done in (0, 1, 9):
        with Parts(stop_after=done), pytest.raises(Stopped):
            tokens_of(path, task, "again")
        with Parts() as rest:
            data = tokens_of(path, task, "again")
        assert rest.rows == 95 - 10 * done
        assert stored(data, path, "again") == expected
        assert data.counts == whole.counts and data.counts.formats == {"prompt_completion": 95}
        assert list(data.records) == list(range(95))
        with Parts() as rest:
            tokens_of(path, task, "again")
        assert rest.rows == 0
        (tmp_path / "again" / data.key).rename(tmp_path / f"done-{done}")


@pytest.mark.parametrize("file", [TOKENS, JOURNAL])
def test_a_damaged_part_is_made_again(tmp_path: Path, task: CausalLM, file: str) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    expected = stored(tokens_of(path, task), path)
    with Parts(stop_after=5), pytest.raises(Stopped):
        tokens_of(path, task, "again")
    (partial,) = (tmp_path / "again").iterdir()
    kept = {name: (partial / name).read_bytes() for name in (TOKENS, JOURNAL)}
    size = len(kept[file])
    for cut in (0, 1, size // 2, size - 1):
        flipped = bytes([kept[file][cut] ^ 0xFF])
        for damage in (kept[file][:cut], kept[file][:cut] + flipped + kept[file][cut + 1 :]):
            shutil.rmtree(tmp_path / "again")
            partial.mkdir(parents=True)
            for name, content in kept.items():
                (partial / name).write_bytes(damage if name == file else content)
            with Parts() as rest:
                data = tokens_of(path, task, "again")
            assert stored(data, path, "again") == expected
            assert rest.rows == 95 if cut < 2 else 45 < rest.rows < 95


def test_a_cut_file_is_not_taken_for_whole(tmp_path: Path, task: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    data = tokens_of(path, task)
    content = stored(data, path)
    with Parts(stop_after=5), pytest.raises(Stopped):
        tokens_of(path, task, "half")
    (partial,) = (tmp_path / "half").iterdir()
    half = (partial / TOKENS).read_bytes()
    assert content.startswith(half)  # at the border of a part
    (tmp_path / "cache" / data.key / TOKENS).write_bytes(half)
    with pytest.raises(UserError, match=r"damaged .50 examples, not 95"):
        tokens_of(path, task)


def test_what_another_process_tokenises_is_waited_for(tmp_path: Path, task: CausalLM) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    waits, found = threading.Event(), []
    options = DataOptions(train=str(path), cache=str(tmp_path / "cache"))
    key = tokens_of(path, task, "other").key

    def second() -> None:
        with Parts() as parts:
            found.append((tokens_of(path, task, check=waits.set).key, parts.rows))

    with lock(tmp_path / "cache" / key, lambda: None, lambda _: None) as unfinished:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(20)
        (tmp_path / "other" / key).rename(unfinished)
        unfinished.rename(tmp_path / "cache" / key)
    thread.join(20)
    assert found == [(key, 0)] and options.workers == "auto"


def test_chunks_hold_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_CHARACTERS", 100)
    long = {"messages": [{"content": "x" * 60}, {"content": ["y" * 60]}], "n": 1}
    rows = [("a:1", long), ("a:2", {"text": "short"}), ("a:3", {"text": "z" * 95}), ("a:4", {})]
    read: list[int] = []
    chunks = list(tokenise._chunks(iter(rows), lambda: read.append(1)))
    assert [len(chunk) for chunk in chunks] == [1, 2, 1]
    assert len(read) == 3


# --- other processes

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": "hm " * n},
        ]
    }
    for n in range(1, 6)
]
LABELLED = [{"text": f"a text {n}", "label": n % 2} for n in range(5)]
MIXED = [row for pair in zip(CHATS, ROWS, strict=False) for row in pair]


def with_template(tokenizer: Any, template: str = CHATML) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def classifier(tokenizer: Any) -> SequenceClassification:
    task = SequenceClassification(SequenceClassificationOptions(), tokenizer)
    task.learn_labels([0, 1])
    return task


@pytest.mark.parametrize("kind", [*KINDS, "slow"])
def test_another_process_has_the_same_tokenizer(tmp_path: Path, kind: str) -> None:
    """What a pickle makes of it encodes alike."""
    tokenizer = with_template(slow_bpe(tmp_path) if kind == "slow" else KINDS[kind]())
    causal = CausalLM(CausalLMOptions(), tokenizer)
    for task, rows in ((causal, MIXED), (classifier(tokenizer), LABELLED)):
        work = Encoder("data", DataOptions(train="data"), task)
        chunk = [(f"data:{n}", row) for n, row in enumerate(rows, 1)]
        batch, counts = pickle.loads(pickle.dumps(work))(chunk)
        expected, same = work(chunk)
        assert batch.equals(expected) and len(batch) == len(rows)
        assert counts == same and counts.used == len(rows)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but nothing is done here: this process waits until others are ready."""
    take_on = Workers._take_on

    def wait(self: Workers) -> None:
        take_on(self)
        if self._pool is not None:
            self._pool.settled.wait()
            take_on(self)

    monkeypatch.setattr(Workers, "_take_on", wait)


@pytest.mark.usefixtures("others")
def test_the_same_bytes_from_other_processes(tmp_path: Path, chat: CausalLM) -> None:
    rows: list[Any] = MIXED * 9
    rows[33:33] = [{"messages": []}, "no record"]
    path = write(tmp_path / "data.jsonl", rows)
    one = tokens_of(path, chat, workers=1, on_bad_record="skip")
    with Parts() as here:
        two = tokens_of(path, chat, "two", workers=2, on_bad_record="skip")
    assert here.rows == 0
    assert stored(two, path, "two") == stored(one, path) and two.key == one.key
    assert two.counts == one.counts
    assert (two.counts.bad, two.counts.used) == (2, len(rows) - 2)


ENDLESS = "{% for i in range(10 ** 9) %}{% endfor %}"
REFUSALS = {
    "a bad record": ({}, CHATML, [*CHATS, {"messages": 1}, "later"]),
    "a long one": ({"max_length": 20, "on_long_record": "stop"}, CHATML, CHATS * 9),
    "a template that does not end": ({}, ENDLESS, CHATS),
    "no Unicode": ({}, CHATML, [*ROWS[:15], {"prompt": "\ud800", "completion": "x"}]),
    "a broken file": ({}, CHATML, [*CHATS * 5, {"messages": 1}, *CHATS * 5]),
}


@thorough
@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", REFUSALS)
def test_the_same_words_from_other_processes(tmp_path: Path, chat: CausalLM, name: str) -> None:
    keys, template, rows = REFUSALS[name]
    path = write(tmp_path / "data.jsonl", rows)
    if name == "a broken file":
        path.write_bytes(path.read_bytes() + b"\xff\n")
    with_template(chat.tokenizer, template)
    words = []
    for workers in (1, 2):
        with pytest.raises(UserError) as caught:
            tokens_of(path, chat, workers=workers, **keys)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert not any((tmp_path / "cache").iterdir())
