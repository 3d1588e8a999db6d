"""Exact match and F1 of answers, as SQuAD's scripts have them (Rajpurkar et al., 2016 and 2018).

Both are of normalised answers, the best over those that people gave, in percent:
evaluate-v1.1.py and evaluate-v2.0.py of https://rajpurkar.github.io/SQuAD-explorer. They differ in
answers of which normalising leaves nothing: the second script does not count them.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(
    predicted: Sequence[str], answers: Sequence[Sequence[str]], *, no_answer: bool
) -> dict[str, float]:
    """`exact_match` and `f1` over questions; `no_answer`: by the script of SQuAD 2.0, also of the
    questions that have an answer (`has_answer_…`) and those that have none (`no_answer_…`)."""
    exact, f1 = [], []
    for text, given in zip(predicted, answers, strict=True):
        if no_answer:
            given = [answer for answer in given if normalised(answer)] or [""]
        exact.append(max(normalised(text) == normalised(answer) for answer in given))
        f1.append(max(_f1(text, answer, no_answer=no_answer) for answer in given))
    scores = {"exact_match": _percent(exact), "f1": _percent(f1)}
    for name, has in (("has_answer", True), ("no_answer", False)) if no_answer else ():
        chosen = [index for index, given in enumerate(answers) if bool(given) == has]
        if chosen:
            scores[f"{name}_exact_match"] = _percent([exact[index] for index in chosen])
            scores[f"{name}_f1"] = _percent([f1[index] for index in chosen])
    return scores


def normalised(answer: str) -> str:
    """In lower case, without punctuation, articles and further spaces."""
    text = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _f1(predicted: str, answer: str, *, no_answer: bool) -> float:
    """2 p r / (p + r) of the words that both have, as often as they have them."""
    found, right = normalised(predicted).split(), normalised(answer).split()
    if no_answer and not (found and right):
        return float(found == right)
    shared = (Counter(found) & Counter(right)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)
