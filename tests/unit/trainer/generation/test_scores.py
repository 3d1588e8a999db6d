"""Scores against scripts and libraries that others wrote, and formulas."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from tests.unit.trainer.generation import official_gsm8k
from trainer.config.generation_options import GenerationOptions
from trainer.errors import UserError
from trainer.generation.scores import check_libraries, extract, score, unusable

needs = pytest.importorskip


def options(**given) -> GenerationOptions:
    return GenerationOptions(**given)


def test_gsm8k_is_scored_as_by_its_own_script(shared_data):
    lines = (shared_data / "gsm8k/test.jsonl").read_text().splitlines()[:300]
    references = [json.loads(line)["answer"] for line in lines]
    generator = random.Random(0)
    variants = [
        lambda text: text,
        lambda text: generator.choice(references),
        lambda text: text.replace("#### ", "####"),
        lambda text: text + "\n#### 7",
        lambda text: text + ".",
        lambda text: re.sub(r"#### .*", "#### -1,000", text),
        lambda text: re.sub(r"#### (\d)", r"#### \1,", text),
        lambda text: text.replace("#### ", "#### $"),
    ]
    answers = [generator.choice(variants)(text) for text in references]
    expected = [
        official_gsm8k.is_correct(answer, {"answer": reference})
        for answer, reference in zip(answers, references, strict=True)
    ]
    assert 0.2 < sum(expected) / len(expected) < 0.8
    scores, rows = score(answers, references, options(pattern="gsm8k"))
    assert [row["exact_match"] for row in rows] == expected
    assert scores == {"exact_match": sum(expected) / len(expected)}


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        (" Paris \n", None, "Paris"),
        ("The answer is (B).", r"\(([A-D])\)", "B"),
        ("so A", r"[A-D]", "A"),
        ("It is 1,234 km", r"\d[\d,]*", "1234"),
        ("a,b", r"a,b", "a,b"),
        ("none", r"\d", None),
        ("ab", r"a|(b)", ""),
    ],
)
def test_what_a_pattern_extracts(text, pattern, found):
    assert extract(text, pattern) == found


def test_an_answer_without_the_pattern_is_wrong_and_such_a_reference_refused():
    given = options(pattern=r"#### (\d+)")
    assert score(["no"], ["#### 3"], given)[0] == {"exact_match": 0}
    assert unusable("#### 3", given) is None
    assert "not found in its answer" in unusable("3", given)


def test_values_are_compared_not_their_writing():
    needs("math_verify")
    pairs = [
        (r"so \boxed{0.5}", r"Thus $\boxed{\frac{1}{2}}$.", 1),
        (r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", 1),
        (r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}", 1),
        (r"\boxed{1,234}", r"\boxed{1234}", 1),
        (r"\boxed{(1,2)}", r"\boxed{(2,1)}", 0),
        (r"\boxed{\frac{1}{3}}", r"\boxed{0.5}", 0),
        ("I do not know", r"\boxed{3}", 0),
    ]
    answers, references, expected = zip(*pairs, strict=True)
    scores, rows = score(answers, references, options(scores=["math"]))
    assert [row["math"] for row in rows] == list(expected)
    assert scores == {"math": 4 / 7}
    assert "no value" in unusable("who knows", options(scores=["math"]))


TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("two dogs ran far away today", "two small dogs ran away"),
    ("nothing in common here at all", "other words stand there now instead"),
    ("the very same words are in both texts", "the very same words are in both texts"),
]


def test_rouge_is_the_f1_of_shared_words_and_of_the_longest_common_subsequence():
    needs("rouge_score")
    answers, references = zip(*TEXTS, strict=True)
    scores, rows = score(answers, references, options(scores=["rouge"]))
    for (answer, reference), row in zip(TEXTS, rows, strict=True):
        own, gold = answer.split(), reference.split()
        for name, shared, sizes in (
            ("rouge1", (Counter(own) & Counter(gold)).total(), (len(own), len(gold))),
            ("rouge2", (Counter(pairs(own)) & Counter(pairs(gold))).total(),
             (len(own) - 1, len(gold) - 1)),
            ("rougeL", common(own, gold), (len(own), len(gold))),
        ):  # fmt: skip
            assert row[name] == pytest.approx(2 * shared / sum(sizes))
    assert scores["rouge1"] == pytest.approx(sum(row["rouge1"] for row in rows) / len(rows))


def test_rouge_is_that_of_torchmetrics(shared_data):
    """Its own implementation, on solutions of GSM8K: stems, numbers, punctuation, cases."""
    needs("rouge_score")
    text = needs("torchmetrics.functional.text.rouge")
    lines = (shared_data / "gsm8k/test.jsonl").read_text().splitlines()[:40]
    references = [json.loads(line)["answer"].partition("####")[0] for line in lines]
    generator, answers = random.Random(0), []
    for reference in references:
        words = reference.upper().split() if len(reference) % 2 else reference.split()
        kept = [f"{word}s" if len(word) % 3 else word for word in words if generator.random() < 0.7]
        answers.append(" ".join(kept))
    names = ("rouge1", "rouge2", "rougeL")
    theirs = text.rouge_score(answers, references, use_stemmer=True, rouge_keys=names)
    scores, _ = score(answers, references, options(scores=["rouge"]))
    expected = {name: float(theirs[f"{name}_fmeasure"]) for name in names}
    assert 0.2 < expected["rouge2"] < expected["rougeL"] < expected["rouge1"] < 0.9
    assert scores == pytest.approx(expected, rel=1e-5)


def pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return common(a[:-1], b[:-1]) + 1
    return max(common(a[:-1], b), common(a, b[:-1]))


def test_bleu_is_that_of_nltk():
    needs("sacrebleu")
    bleu = needs("nltk.translate.bleu_score")
    answers, references = zip(*TEXTS, strict=True)
    scores, rows = score(answers, references, options(scores=["bleu"]))
    gold = [[text.split()] for text in references]
    expected = bleu.corpus_bleu(gold, [text.split() for text in answers])
    assert scores["bleu"] == pytest.approx(100 * expected)
    assert rows == [{}] * len(TEXTS)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"bleu given, but sacrebleu is not installed.*\[eval\]"):
        check_libraries(options(scores=["exact_match", "bleu"]))
