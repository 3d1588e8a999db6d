"""Long texts: of their tokens the first ones, without tokenising the rest."""

import functools
import itertools
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers

from tests.hostile import fuzz
from tests.unit.trainer.tasks.test_tokenisation import made
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import KINDS, byte_level, sentencepiece
from trainer.tasks import long_texts
from trainer.tasks.base import Example, Record, TooLong
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.long_texts import beginning, can_cut, truncated_pair
from trainer.tasks.options import SequenceClassificationOptions
from trainer.tasks.sequence_classification import SequenceClassification
from trainer.tasks.tokenisation import tokenise

WORDS = ["Hello", "world", "a", "7", "1234567", "İ", "Å", "über", "ﷺ", "あ", "ς", "e\u0301"]
PIECES = st.lists(
    st.sampled_from(
        [*WORDS, " ", " ", " ", "  ", "\n", "\r\n", "\t", "\u200b", "\u00a0", "\u0301", "¨", "...",
         "!", "?\n", "<|user|>", "<|end|>", "<|en", "👩‍👩‍👧", "ﬁ", "½", "'s", "_", "▁", "Ġ"]
    ) | st.text(max_size=3), min_size=10, max_size=60,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@fuzz(usual=40)
@given(segments=st.lists(st.tuples(PIECES, st.booleans()), min_size=1, max_size=3), data=st.data())
def test_the_first_tokens_are_those_of_the_whole_text(kind: str, segments: list, data: Any) -> None:
    text = "".join(part for part, _ in segments)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    tokenizer, first = made(kind), data.draw(st.integers(1, 12))
    with patch.object(long_texts, "_CHARACTERS", data.draw(st.sampled_from([1, 3, 8]))):
        ((whole, whole_mask),) = tokenise(tokenizer, [segments])
        ((ids, mask),) = tokenise(tokenizer, [segments], first)
    assert ids[: first + 1] == whole[: first + 1]
    assert mask[: first + 1] == whole_mask[: first + 1]
    assert len(ids) == len(mask)


def test_what_can_be_cut() -> None:
    """Not where merges cross spaces, nor a Python class, of which nothing is known."""
    whole = [kind for kind in KINDS if not can_cut(made(kind))]
    assert whole == ["Prepend", "NFKC, lowercase", "ByT5"]


def changed(**parts: Any) -> Any:
    tokenizer = sentencepiece(None, pre_tokenizers.Metaspace())
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_token(content: str) -> Any:
    tokenizer = changed()
    tokenizer.add_tokens([content])
    return tokenizer


REACHING: dict[str, Any] = {
    "a token of two words": functools.partial(with_token, "at all"),
    "a normaliser that joins words": lambda: changed(normalizer=normalizers.Replace(" ", "")),
    "one that writes letters": lambda: changed(normalizer=normalizers.Replace(" ", "a")),
    "one that sees words": lambda: changed(normalizer=normalizers.Replace("at", "@")),
    "any pattern": lambda: changed(normalizer=normalizers.Replace(Regex("a.*z"), "")),
    "another space": lambda: changed(pre_tokenizer=pre_tokenizers.Metaspace(replacement="_")),
    "dropout": lambda: changed(model=models.BPE({"▁": 0, "a": 1}, [], dropout=0.5)),
    "words that are not split": lambda: changed(model=models.WordPiece({"a": 0}, unk_token="a")),
    "no token for a space": lambda: changed(model=models.BPE({"a": 0}, [])),
}


@pytest.mark.parametrize("kind", REACHING)
def test_what_reaches_across_spaces_is_tokenised_whole(kind: str) -> None:
    assert can_cut(changed())
    assert not can_cut(REACHING[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_huge_text_without_spaces_the_first_characters_are_tokenised(kind: str) -> None:
    tokenizer = made(kind)
    dice = np.random.default_rng(0)
    text = "".join(dice.choice([*"abcdehlorwt0123", "あ", "é"], 20_000))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    with patch.object(long_texts, "_MOST", 4000):
        part = beginning(tokenizer, text, 10)
    if len(part) < len(text):
        assert len(part) == 4000
        assert tokenizer(part, add_special_tokens=False)["input_ids"][:11] == whole[:11]
    else:
        assert len(whole) <= 20  # a single unknown word


def test_huge_pairs_are_bounded() -> None:
    tokenizer = byte_level(False, False)
    task = SequenceClassification(SequenceClassificationOptions(), tokenizer)
    task.labels = ["no", "yes"]
    tokenizer.sep_token = "<|end|>"
    texts = ["lo" * 5_000_000, "Hello world " * 1_000_000]
    with patch.object(long_texts, "_MOST", 2**16):
        (found,) = task.encode([Record([(text, False) for text in texts], label="yes")], 64)
    assert isinstance(found, Example) and found.truncated
    assert found.input_ids == encoded(tokenizer, *(text[:3000] for text in texts))


def encoded(tokenizer: Any, *texts: str, length: int = 64) -> list[int]:
    return tokenizer(*texts, truncation="longest_first", max_length=length)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_truncated_as_by_the_tokenizer(kind: str) -> None:
    tokenizer, words = made(kind), "the quick brown fox jumps over the lazy dog " * 4
    if not tokenizer.is_fast:
        return
    for first, second, length in itertools.product((3, 9, 40, 80, 81), (3, 40, 81), (7, 8, 21)):
        texts = words[:first], words[:second]
        whole = tokenizer(*texts)["input_ids"]
        if len(whole) > length:
            assert truncated_pair(tokenizer, *texts, length).ids == encoded(
                tokenizer, *texts, length=length
            )


def test_no_more_is_tokenised_than_needed() -> None:
    """Texts of 20 million characters, words or none."""
    tokenizer = byte_level(False, False)
    text = "Hello world again " * 1_200_000
    assert len(beginning(tokenizer, text, 128)) < 5000
    assert len(beginning(tokenizer, "lo" * 3000, 128)) == 6000
    assert len(beginning(tokenizer, "lo" * 3000 + text, 128)) < 10_000


@pytest.mark.parametrize("add_eos", ["auto", False])
def test_what_is_learned_behind_the_beginning_is_not_missing(add_eos: Any) -> None:
    """A completion that is not reached is no empty one."""
    task = CausalLM(CausalLMOptions(), byte_level(False, False))

    def encoded(*segments: tuple[str, bool]) -> Example | str:
        (found,) = task.encode([Record(list(segments), add_eos=add_eos)], 8)
        return found

    prompt = "the quick brown fox " * 50
    behind = encoded((prompt, False), (" four", True))
    assert isinstance(behind, TooLong) and "the prompt alone fills" in behind
    assert "completion is empty" in str(encoded((prompt, False), ("", True)))
    within = encoded(("Hello", False), (prompt, True))
    assert isinstance(within, Example) and within.truncated and len(within.input_ids) == 8
