"""The `generation` section of the configuration: answers to held-out records, and their scores."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from adapters.options import Section

Score = Literal["exact_match", "math", "rouge", "bleu"]

PATTERNS = {
    # `ANS_RE` of openai/grade-school-math, dataset.py
    "gsm8k": r"#### (\-?[0-9\.\,]+)",
}
"""Patterns by name."""


class GenerationOptions(Section):
    """Generation: how tokens are chosen, and what evaluations generate and score."""

    records: int = Field(0, ge=0)
    """Evaluation records that every evaluation generates answers to, the first ones; 0: none. Their
    texts and scores are written to `predictions.jsonl` in the run folder."""
    scores: list[Score] = ["exact_match"]
    """Scores of the answers against the records' own: `exact_match` (of what `pattern` finds),
    `math` (equal in value, by math-verify), `rouge` (rouge-score), `bleu` (sacrebleu). All but the
    first need the `eval` extra."""
    pattern: str | None = None
    """Regular expression of what `exact_match` compares: its first group, or all of it, where it is
    first found, numbers without commas; or `gsm8k`, the pattern of that data set's own script. An
    answer without it is wrong. Null: the whole text, without spaces around it."""
    max_new_tokens: int = Field(256, gt=0)
    """Tokens of an answer, at most."""
    temperature: float = Field(0.0, ge=0)
    """0: always the likeliest token; else what logits are divided by before a token is drawn."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = Field(0, ge=0)
    """Draw from this many likeliest tokens; 0: from all."""
    stop: list[str] = []
    """Texts that end an answer, of which they are no part. End tokens end it anyway: those that
    generation_config.json names, and the tokenizer's."""
    batch_size: int = Field(8, gt=0)
    """Prompts that a rank answers at a time."""
    shown: int = Field(5, ge=0)
    """Answers shown in TensorBoard and in the run's README.md."""

    @property
    def metrics(self) -> dict[str, Literal["min", "max"]]:
        """Names of the scores of answers, all of which are best where they are largest."""
        names = {"rouge": ("rouge1", "rouge2", "rougeL")}
        scores = [name for score in self.scores for name in names.get(score, (score,))]
        return dict.fromkeys([*scores, "ended"], "max") if self.records else {}

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(PATTERNS.get(value, value))
            except re.error as error:
                raise ValueError(
                    f"generation.pattern: {value!r} given: {error}; accepted: a regular expression "
                    f"of Python, or {', '.join(PATTERNS)}"
                ) from error
        return value

    @model_validator(mode="after")
    def _check(self) -> "GenerationOptions":
        if "" in self.stop:
            raise ValueError(
                f"generation.stop: {self.stop} given; accepted: texts that are not empty"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            key, value = ("top_p", self.top_p) if self.top_p < 1 else ("top_k", self.top_k)
            raise ValueError(
                f"generation.{key}: {value} given with generation.temperature=0, where nothing is "
                "drawn; accepted: a temperature above 0"
            )
        if self.pattern is not None and "exact_match" not in self.scores:
            raise ValueError(
                f"generation.pattern: {self.pattern} given without exact_match among "
                "generation.scores; accepted: null"
            )
        return self
