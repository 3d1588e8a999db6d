"""The table in docs/data.md: what is learned from each input, against what TRL learned from it."""

import pytest

from tests.campaigns.data_table import PAGE, alike, kept, page
from tests.unit.trainer.data.families import FAMILIES
from tests.unit.trainer.data.inputs import INPUTS, Input


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: f"{case.what}, {case.family}")
def test_learned_as_trl_learns_it_unless_the_table_says_why(case: Input) -> None:
    assert alike(case) is not bool(case.difference)


def test_the_table_is_that_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "python -m tests.campaigns.data_table writes it"


def test_there_are_enough_of_them() -> None:
    named = {(case.what, case.family) for case in INPUTS}
    assert len(INPUTS) == len(named) >= 25
    assert {case.family for case in INPUTS} - {None} == set(FAMILIES) and len(FAMILIES) >= 12


def test_compact_templates_render_as_the_published_ones() -> None:
    """As they did where TRL was, which ships most of them."""
    compared = [found["renders_alike"] for found in kept()["inputs"]]
    assert compared.count(True) > 25 and False not in compared
