"""Figures that a method declares of what it decides; `trainer/report/` draws them.

Data only and free of torch: which numbers, how they are called, and the quantity they are.
Ranks, locations and survivors of a `Decision` are drawn for every method without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curves:
    """Numbers over steps, one panel under another: {y axis: {line: key}}.

    A key is one of `Method.scalars`, or a number in the `scores` or `extra` of the decisions.
    """

    name: str
    """Of the file."""
    title: str
    panels: Mapping[str, Mapping[str, str]]
    signed: frozenset[str] = frozenset()
    """Panels whose axis does not begin at 0."""

    @property
    def leading(self) -> str:
        """The first key: without a value of it, nothing is drawn."""
        return next(key for lines in self.panels.values() for key in lines.values())


@dataclass(frozen=True)
class UnitScores:
    """A score of every unit (`Decision.scores`): the last one as bars, all of them over steps."""

    key: str
    """In `scores`; the name of the file too."""
    title: str
    symbol: str
    neutral: float = 0.0
    """What a score starts at; differences from it are drawn."""


Figure = Curves | UnitScores

BUDGET = Curves(
    "budget",
    "Budget and mean rank",
    {
        "budget (components)": {"budget": "budget"},
        "mean rank (components)": {"mean rank": "mean_rank"},
    },
)
"""Of methods that share a budget of components (AdaLoRA's schedule; La-LoRA's DCDPB, eq. 5)."""
