"""Generated answers as a table of Markdown, for TensorBoard and the run's README."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("prompt", "text", "reference")
_AFTER = ("record", "step", "set", "tokens", "ended", *_COLUMNS)
"""Keys that are no scores."""
_PLAIN = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_[]~|"} | {ord("\n"): "<br>"}
_CHARACTERS = 400  # of a cell: the end of a prompt, the beginning of other texts


def answers_table(answers: Sequence[Mapping[str, Any]], count: int) -> str:
    """The first `count` of them, with their scores; "" where there is none that was generated."""
    chosen = [answer for answer in answers if "prompt" in answer][:count]
    if not chosen:
        return ""
    scores = [name for name in chosen[0] if name not in _AFTER]
    names = ["record", "prompt", "answer", "reference", *scores]
    rows = [
        [
            str(answer["record"] + 1),
            *(_cell(answer[name] or "", end=name == "prompt") for name in _COLUMNS),
            *(f"{answer[name]:.3g}" for name in scores),
        ]
        for answer in chosen
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows])


def _cell(text: str, *, end: bool) -> str:
    """A text as one line of Markdown in which nothing is markup."""
    if len(text) > _CHARACTERS:
        text = f"… {text[-_CHARACTERS:]}" if end else f"{text[:_CHARACTERS]} …"
    return html.escape(text.strip(), quote=False).translate(_PLAIN)
