"""The table in docs/data.md: what is learned from each input, as tokens, beside what TRL learns.

    python -m tests.campaigns.data_table

writes it from the project itself and from what TRL learned when `trl_reference.py` asked it.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.trainer.data.families import tokenizer_of
from tests.unit.trainer.data.inputs import INPUTS, Input
from trainer.config.data_options import DataOptions
from trainer.data.formats import detect_format, to_records
from trainer.errors import BadRecord
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/data.md"
KEPT = ROOT / "tests/kept/trl.json"
_MARKS = "<!-- inputs: begin -->\n", "<!-- inputs: end -->\n"


@dataclass(frozen=True)
class Learned:
    """An example: token ids, and for each whether it is learned. The first never is: nothing predicts it."""

    ids: tuple[int, ...]
    learned: tuple[int, ...]

    @classmethod
    def of(cls, ids: list[int], learned: list[int]) -> "Learned":
        return cls(tuple(ids), (0, *map(int, learned[1:])))


@functools.cache
def tokenizer(family: str | None) -> Any:
    """Of a family, made once."""
    return tokenizer_of(family)


def ours(case: Input) -> list[Learned] | str:
    """The examples of an input, or the reason for which it is refused."""
    reader = tokenizer(case.family)
    options = DataOptions(train="-", **case.data)
    task = CausalLM(CausalLMOptions(loss_on=case.loss_on), reader)
    try:
        records = to_records(case.row, detect_format(case.row, options, task), options, reader)
    except BadRecord as error:
        return str(error)
    examples = []
    for found in task.encode(records, 4096):
        if isinstance(found, str):
            return found
        examples.append(Learned.of(list(found.input_ids), list(found.loss_mask)))
    return examples


@functools.cache
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text(encoding="utf-8"))


def trls(case: Input) -> list[Learned] | str:
    """TRL's examples, or the error that it ended in."""
    (found,) = (e for e in kept()["inputs"] if (e["what"], e["family"]) == (case.what, case.family))
    errors = [e["error"] for e in found[case.reference] if "error" in e]
    if errors:
        return errors[0]
    return [Learned.of(e["ids"], e["learned"]) for e in found[case.reference]]


def joined(examples: list[Learned]) -> list[Learned]:
    """Examples that are beginnings of the last one, as one that learns what any of them does."""
    last = examples[-1]
    if any(e.ids != last.ids[: len(e.ids)] for e in examples):
        return examples
    learned = [0] * len(last.ids)
    for example in examples:
        for index, is_learned in enumerate(example.learned):
            learned[index] |= is_learned
    return [Learned(last.ids, tuple(learned))]


def alike(case: Input) -> bool:
    """Whether both learn the same tokens in the same contexts."""
    mine, theirs = ours(case), trls(case)
    if isinstance(mine, str) or isinstance(theirs, str):
        return False
    return mine == (joined(theirs) if len(mine) == 1 < len(theirs) else theirs)


def shown(case: Input, examples: list[Learned] | str) -> str:
    """The learned tokens: a code span for every stretch of them, a line for every example."""
    if isinstance(examples, str):
        return "refused: " + examples.replace("|", "\\|")
    lines = []
    for example in examples:
        spans: list[list[str]] = [[]]
        for token, is_learned in zip(example.ids, example.learned, strict=True):
            if is_learned:
                spans[-1].append(tokenizer(case.family).decode([token]))
            elif spans[-1]:
                spans.append([])
        lines.append(" … ".join(_code("·".join(span)) for span in spans if span))
    return "<br>".join(lines)


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


def rows() -> list[str]:
    lines = ["| input | template | what is learned | TRL |", "|-|-|-|-|"]
    for case in INPUTS:
        if alike(case):
            theirs = "same" if case.reference == "sft" else "same, answer by answer"
        else:
            found = trls(case)
            theirs = f"{case.difference}: " + (
                shown(case, found) if isinstance(found, list) else "refused"
            )
        what = case.what + "".join(
            f", `{key}: {json.dumps(value)}`" for key, value in case.data.items()
        )
        lines.append(f"| {what} | {case.family or '–'} | {shown(case, ours(case))} | {theirs} |")
    return lines


def page(text: str) -> str:
    """The page with the table of today."""
    begin, end = _MARKS
    before, _, rest = text.partition(begin)
    return before + begin + "\n".join(rows()) + "\n" + end + rest.partition(end)[2]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(text), encoding="utf-8")


if __name__ == "__main__":
    main()
