"""Declarations of a method's figures, drawn by `trainer/report/`.

Plain data without torch: keys, labels and quantities. The ranks, locations and survivors of a
`Decision` are drawn for every method without a declaration.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curves:
    """Numbers over steps, in stacked panels: {y axis: {line: key}}.

    A key is one of `Method.scalars`, or of a number in `scores` or `extra` of the decisions.
    """

    name: str
    """File name without suffix."""
    title: str
    panels: Mapping[str, Mapping[str, str]]
    signed: frozenset[str] = frozenset()
    """Panels whose y axis does not start at 0."""

    @property
    def leading(self) -> str:
        """The first key; without values of it nothing is drawn."""
        return next(key for lines in self.panels.values() for key in lines.values())


@dataclass(frozen=True)
class UnitScores:
    """A score per unit (`Decision.scores`): the last values as bars, all of them over steps."""

    key: str
    """Key in `scores`, and file name without suffix."""
    title: str
    symbol: str
    neutral: float = 0.0
    """Initial score; the difference from it is drawn."""


Figure = Curves | UnitScores

BUDGET = Curves(
    "budget",
    "Budget and mean rank",
    {
        "budget (components)": {"budget": "budget"},
        "mean rank (components)": {"mean rank": "mean_rank"},
    },
)
"""For methods with a global budget of components (AdaLoRA's schedule; La-LoRA's DCDPB, eq. 5)."""
