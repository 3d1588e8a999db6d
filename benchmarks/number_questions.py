"""Write extractive questions in SQuAD's own JSON, made of GSM8K's word problems.

    python -m benchmarks.number_questions GSM8K.jsonl OUT.json [--without 3]

The context is a problem with three numbers or more. The question is its first sentence with a
single number, which is replaced by "how many"; the number is the answer. `--without N`: every N-th
is asked about the problem before it, where it has no answer, as in SQuAD 2.0.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.config.arguments import Parser, at_least, new_file

NUMBER = re.compile(r"\d[\d,.]*\d|\d")
SENTENCE = re.compile(r"[^.?!]+[.?!](?=\s|$)")


def number_questions(problems: Iterable[str], *, without: int = 0) -> Iterator[dict]:
    """Questions, one a row as the hub has SQuAD: `id`, `question`, `context` and `answers`."""
    count, before = 0, ""
    for text in problems:
        asked = _asked(text) if len(NUMBER.findall(text)) >= 3 else None
        if asked is not None:
            question, number = asked
            row = {"id": str(count), "question": question, "context": text}
            if without and before and count % without == 0:
                yield row | {"context": before, "answers": {"text": [], "answer_start": []}}
            else:
                answers = {"text": [number.group()], "answer_start": [number.start()]}
                yield row | {"answers": answers}
            count += 1
        before = text


def _asked(text: str) -> tuple[str, re.Match[str]] | None:
    """(question, the number that answers it)"""
    for sentence in SENTENCE.finditer(text):
        numbers = list(NUMBER.finditer(text, sentence.start(), sentence.end()))
        if len(numbers) == 1:
            (number,) = numbers
            before = text[sentence.start() : number.start()]
            behind = text[number.end() : sentence.end()]
            return f"{before}how many{behind}".strip(), number
    return None


def squad_json(rows: Iterable[dict], *, without: bool) -> dict:
    """The rows in the form of SQuAD's files."""
    paragraphs = []
    for row in rows:
        given = row["answers"]
        pairs = zip(given["text"], given["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked = {"id": row["id"], "question": row["question"], "answers": answers}
        if without:
            asked["is_impossible"] = not answers
        paragraphs.append({"context": row["context"], "qas": [asked]})
    version = "v2.0" if without else "1.1"
    return {"version": version, "data": [{"title": "GSM8K", "paragraphs": paragraphs}]}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("problems", type=Path, help="GSM8K's jsonl")
    parser.add_argument("out", type=new_file)
    parser.add_argument(
        "--without", type=at_least(2), default=0, metavar="N", help="every N-th has no answer"
    )
    arguments = parser.parse_args()
    lines = arguments.problems.read_text(encoding="utf-8").splitlines()
    problems = (json.loads(line)["question"] for line in lines)
    rows = list(number_questions(problems, without=arguments.without))
    made = squad_json(rows, without=bool(arguments.without))
    arguments.out.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    print(f"{arguments.out}: {len(rows)} questions")


if __name__ == "__main__":
    main()
