"""Questions with several choices, of which one is right: a row's question, choices and label."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from trainer.config.data_options import SourceOptions
from trainer.data.messages import no_column
from trainer.errors import BadRecord
from trainer.tasks.base import Record

Texts = Callable[[str, dict], str]
"""(column or template, row) -> text."""

_FORMAT = re.compile(r"\s*Answer format:\s*(.+?)\s*$")
_LEAD = re.compile(r"^Please [^:]*?(?:: |, question: )")
_NUMBERED = re.compile(r"[1-9]$")
_ASKED = "Question: {question}\nAnswer:"


def multiple_choice(row: dict, options: SourceOptions, part: Texts) -> list[Record]:
    """A record for each choice; `label`: whether it is the right one. Raises BadRecord."""
    question = part(options.prompt, row)
    if options.choice_texts is not None:
        texts, labels = options.choice_texts, None
    elif isinstance(options.choices, list):
        texts, labels = [part(choice, row) for choice in options.choices], None
    else:
        if options.choices not in row:
            raise BadRecord(no_column(options.choices, row))
        texts, labels = _column(row[options.choices], options.choices)
    named = options.choice_labels or labels
    _refuse_ambiguous(row.get(options.label), options.label, texts, named)
    labels = named or [str(number) for number in range(len(texts))]
    right = _right(row, options.label, texts, labels)
    return _scored(question, texts, right, options)


def commonsense(row: dict, options: SourceOptions, part: Texts, asked: str) -> list[Record]:
    """LLM-Adapters' form: the answers stand in the instruction, and their names at its end.
    `data.prompt` may use the column `question` for what is asked. `asked`: the instruction in
    Alpaca's form, for `data.answers: names`."""
    for column in ("instruction", "output", "answer"):
        if not isinstance(row.get(column), str):
            raise BadRecord(no_column(column, row) if column not in row else f"{column}: no text")
    instruction, answer = row["instruction"], row["answer"]
    found = _FORMAT.search(instruction)
    if found is None:
        raise BadRecord("instruction has no 'Answer format: …' at its end")
    names = found.group(1).split("/")
    if answer not in names:
        raise BadRecord(f"answer {answer!r}; accepted: one of {', '.join(names)}")
    right = names.index(answer)
    if options.answers == "names":
        sentence = row["output"]
        if answer not in sentence:
            raise BadRecord(f"output does not name the answer {answer!r}")
        before, _, after = sentence.rpartition(answer)
        return _records([(asked, f"{before}{name}{after}") for name in names], right, options)
    body = _LEAD.sub("", instruction[: found.start()])
    question, texts = _answers(body, names)
    if options.choice_texts is not None:
        if len(options.choice_texts) != len(names):
            raise BadRecord(f"{len(names)} answers for {len(options.choice_texts)} choice_texts")
        texts = options.choice_texts
    prompt = options.prompt
    if prompt == SourceOptions.model_fields["prompt"].default:
        prompt = "question" if options.blank is not None else _ASKED
    return _scored(part(prompt, {**row, "question": question}), texts, right, options)


def _answers(body: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """The question and the texts of the answers of `Question Answer1: … Answer2: …`; names without
    numbers (true, false) are the answers themselves."""
    if not all(_NUMBERED.search(name) for name in names):
        return body.strip(), list(names)
    marks = [re.escape(name[0].upper() + name[1:]) + ":" for name in names]
    found = re.fullmatch(
        r"(.*?)\s*" + r"\s+".join(rf"{mark}\s*(.*?)" for mark in marks), body, re.DOTALL
    )
    if found is None:
        raise BadRecord(f"instruction does not have {', '.join(names)} in this order")
    question, *texts = (text.strip() for text in found.groups())
    return question, texts


def _column(value: Any, column: str) -> tuple[list[str], list[str] | None]:
    """Texts and labels of a column of choices."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label")
        return _texts(value["text"], column), None if labels is None else _texts(labels, column)
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        texts = [one.get("text") for one in value]
        labels = [one.get("label") for one in value]
        return _texts(texts, column), None if None in labels else _texts(labels, column)
    if isinstance(value, list):
        return _texts(value, column), None
    raise BadRecord(f"{column} holds a {type(value).__name__}; accepted: a list of texts")


def _texts(values: list, column: str) -> list[str]:
    for value in values:
        if not isinstance(value, str | int | float) or value != value:
            what = "NaN" if value != value else f"a {type(value).__name__}"
            raise BadRecord(f"{column} holds {what} among its texts")
    return [str(value) for value in values]


def _right(row: dict, column: str, texts: Sequence[str], labels: Sequence[str]) -> int:
    """Index of the right choice."""
    if column not in row:
        raise BadRecord(no_column(column, row))
    value = row[column]
    if len(labels) < len(texts):
        raise BadRecord(f"{len(texts)} choices for {len(labels)} labels ({', '.join(labels)})")
    # JSON's true is "true" in a list of labels, but 1 where choices are numbered.
    for given in [str(value).lower(), str(int(value))] if isinstance(value, bool) else [str(value)]:
        for known in (labels[: len(texts)], texts):
            if list(known).count(given) == 1:
                return list(known).index(given)
    raise BadRecord(
        f"{column} is {value!r}; accepted: {', '.join(labels[: len(texts)])}, or a choice"
    )


def _refuse_ambiguous(
    value: Any, column: str, texts: Sequence[str], labels: Sequence[str] | None
) -> None:
    """Raises BadRecord for a label that is a text and could be the number of one choice, or the
    text of another."""
    if labels is not None or not isinstance(value, str) or value not in texts:
        return
    if value.isdecimal() and int(value) < len(texts) and texts[int(value)] != value:
        raise BadRecord(
            f"{column} is {value!r}, which is choice number {value} from 0 ({texts[int(value)]!r}) "
            "and the text of another; accepted: data.choice_labels, which says what labels are"
        )


def _scored(
    question: str, texts: Sequence[str], right: int, options: SourceOptions
) -> list[Record]:
    """Choices behind the question; or in its blank, where what follows the blank is scored:
    "partial" scoring (Trinh and Le, 2018, arXiv:1806.02847), as EleutherAI's harness does it."""
    if options.blank is None:
        return _records([(question, f" {text}") for text in texts], right, options)
    before, found, after = question.partition(options.blank)
    if not found or not after.strip():
        raise BadRecord(f"nothing to score: no text behind a blank {options.blank!r} in the prompt")
    return _records([(before + text, f" {after.strip()}") for text in texts], right, options)


def _records(parts: Sequence[tuple[str, str]], right: int, options: SourceOptions) -> list[Record]:
    """A record for each (what is given, what is scored)."""
    if len(parts) < 2:
        raise BadRecord(f"{len(parts)} choices; accepted: two or more")
    for number, (_, scored) in enumerate(parts, 1):
        if not scored.strip():
            raise BadRecord(f"choice {number} of {len(parts)} has no text")
    return [
        Record(
            [(given, False), (scored, True)],
            label=float(index == right), add_bos=options.add_bos, add_eos=options.add_eos,
        )
        for index, (given, scored) in enumerate(parts)
    ]  # fmt: skip
