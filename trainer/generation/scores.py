"""Scores of answers against references: exact match, equality in value, ROUGE, BLEU.

All but the first come from the libraries that publications use; each is imported when it is asked
for (`pip install rankcast[eval]`).
"""

import importlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config.generation_options import PATTERNS, GenerationOptions
from trainer.errors import UserError

Values = dict[str, list[float]]
"""Per answer, by name."""
Scores = tuple[dict[str, float], Values]
Scorer = Callable[[Sequence[str], Sequence[str], GenerationOptions], Scores]
"""(answers, references) -> (scores by name, the same per answer where they have it)"""

_LIBRARIES = {"math": "math_verify", "rouge": "rouge_score", "bleu": "sacrebleu"}
_NUMBER = re.compile(r"-?[0-9.,]+")
_ROUGE = ("rouge1", "rouge2", "rougeL")


def score(
    answers: Sequence[str], references: Sequence[str], options: GenerationOptions
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """(`generation.scores` by name, those of each answer)"""
    scores: dict[str, float] = {}
    values: Values = {}
    for name in options.scores:
        found, by_answer = _SCORERS[name](answers, references, options)
        scores |= found
        values |= by_answer
    rows = [
        {name: column[index] for name, column in values.items()} for index in range(len(answers))
    ]
    return scores, rows


def check_libraries(options: GenerationOptions) -> None:
    """Raises UserError where a library is missing."""
    for name in options.scores:
        library = _LIBRARIES.get(name)
        if library is None:
            continue
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UserError(
                f"generation.scores: {name} given, but {library} is not installed; accepted: after "
                "`pip install rankcast[eval]`"
            ) from error


def unusable(reference: str, options: GenerationOptions) -> str | None:
    """Why no answer can be right against this reference, if so."""
    if options.pattern is not None and extract(reference, options.pattern) is None:
        return f"generation.pattern: {options.pattern} is not found in its answer"
    if "math" in options.scores and not _parse(reference):
        return "generation.scores: math given, but math-verify finds no value in its answer"
    return None


def extract(text: str, pattern: str | None) -> str | None:
    """What `exact_match` compares; None where the pattern is not found."""
    if pattern is None:
        return text.strip()
    match = re.search(PATTERNS.get(pattern, pattern), text)
    if match is None:
        return None
    found = (match.group(1) if match.re.groups else match.group()) or ""
    found = found.strip()
    return found.replace(",", "") if _NUMBER.fullmatch(found) else found


def _exact_match(
    answers: Sequence[str], references: Sequence[str], options: GenerationOptions
) -> Scores:
    """Share of the answers of which `pattern` extracts what it extracts of the reference."""
    right = []
    for answer, reference in zip(answers, references, strict=True):
        found = extract(answer, options.pattern)
        right.append(float(found is not None and found == extract(reference, options.pattern)))
    return _means({"exact_match": right})


def _math(answers: Sequence[str], references: Sequence[str], _: GenerationOptions) -> Scores:
    """Share of the answers whose value (in a box, in dollars, or a number) math-verify finds equal
    to the reference's."""
    from math_verify import verify

    pairs = zip(answers, references, strict=True)
    return _means({"math": [float(verify(_parse(gold), _parse(own))) for own, gold in pairs]})


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text)


def _rouge(answers: Sequence[str], references: Sequence[str], _: GenerationOptions) -> Scores:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, of stemmed words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_ROUGE, use_stemmer=True)
    found = [
        scorer.score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return _means({name: [one[name].fmeasure for one in found] for name in _ROUGE})


def _bleu(answers: Sequence[str], references: Sequence[str], _: GenerationOptions) -> Scores:
    """BLEU of all answers together, from 0 to 100, with sacrebleu's own tokens (13a)."""
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score}, {}


def _means(values: Values) -> Scores:
    return {name: statistics.fmean(column) for name, column in values.items()}, values


_SCORERS: Mapping[str, Scorer] = {
    "exact_match": _exact_match, "math": _math, "rouge": _rouge, "bleu": _bleu,
}  # fmt: skip
