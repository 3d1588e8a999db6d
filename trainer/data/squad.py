"""Questions on a text, in SQuAD's form: rows, and the files that its authors publish."""

from collections.abc import Iterator
from typing import Any

from trainer.data.messages import no_column
from trainer.errors import BadRecord
from trainer.tasks.base import Record


def question_answering(row: dict) -> Record:
    """The record of a row {question, context, answers, is_impossible}. `answers`: {text: […],
    answer_start: […]}, or a list of {text, answer_start}. Raises BadRecord."""
    for column in ("question", "context"):
        if not isinstance(row.get(column), str):
            raise BadRecord(no_column(column, row) if column not in row else f"{column}: no text")
    question, context = row["question"], row["context"]
    answers = () if row.get("is_impossible") is True else tuple(_answers(row))
    for number, (text, start) in enumerate(answers):
        if not text.strip() or context[start : start + len(text)] != text or start < 0:
            raise BadRecord(
                f"answers[{number}]: {text!r} does not stand in context from character {start} on"
            )
    return Record([(question, False), (context, False)], answers=answers)


def _answers(row: dict) -> Iterator[tuple[str, int]]:
    if "answers" not in row:
        raise BadRecord(no_column("answers", row))
    given = row["answers"]
    if isinstance(given, dict) and {"text", "answer_start"} <= given.keys():
        texts, starts = given["text"], given["answer_start"]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadRecord("answers: text and answer_start are not two lists of one length")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(given, list) and all(isinstance(one, dict) for one in given):
        pairs = [(one.get("text"), one.get("answer_start")) for one in given]
    else:
        raise BadRecord("answers: accepted: {text: […], answer_start: […]}")
    for number, (text, start) in enumerate(pairs):
        if not isinstance(text, str) or type(start) is not int:
            raise BadRecord(f"answers[{number}]: accepted: a text, and the character it starts at")
        yield text, start


def is_official(value: Any) -> bool:
    """Whether parsed JSON is a file as SQuAD's authors publish it."""
    articles = value.get("data") if isinstance(value, dict) else None
    return isinstance(articles, list) and all(
        isinstance(article, dict) and isinstance(article.get("paragraphs"), list)
        for article in articles
    )


def official_rows(value: dict) -> Iterator[dict]:
    """A row for each question of such a file."""
    for article in value["data"]:
        for paragraph in article["paragraphs"]:
            inside = paragraph if isinstance(paragraph, dict) else {}
            questions = inside.get("qas")
            for question in questions if isinstance(questions, list) else [{}]:
                own = question if isinstance(question, dict) else {}
                yield {**own, "context": inside.get("context")}
