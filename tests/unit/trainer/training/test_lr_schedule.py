"""The learning rate at each step against the closed forms."""

import math

import pytest

from trainer.config.sections import OptimOptions
from trainer.training.lr_schedule import learning_rate, warmup_steps


def rates(steps: int, **keys) -> list[float]:
    options = OptimOptions(learning_rate=2.0, **keys)
    return [learning_rate(options, step, steps) for step in range(steps)]


def test_linear() -> None:
    assert rates(4) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(6, warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])


def test_cosine() -> None:
    assert rates(4, schedule="cosine") == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    )
    expected = [0.5, 1.0, 1.5, 2.0] + [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert rates(10, schedule="cosine", warmup_steps=4) == pytest.approx(expected)


def test_constant() -> None:
    assert rates(5, schedule="constant", warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_never_above_the_peak_and_never_zero(schedule: str) -> None:
    for steps in (1, 2, 7):
        for warmup in range(steps + 1):
            values = rates(steps, schedule=schedule, warmup_steps=warmup)
            assert all(0 < value <= 2.0 for value in values)
            assert max(values) == 2.0


def test_after_the_last_step_nothing_is_left() -> None:
    for schedule, rest in (("linear", 0.0), ("cosine", 0.0), ("constant", 2.0)):
        options = OptimOptions(learning_rate=2.0, schedule=schedule, warmup_steps=3)
        assert learning_rate(options, 10, 10) == pytest.approx(rest)


@pytest.mark.parametrize(
    ("ratio", "steps", "expected"),
    [
        (0.0, 100, 0),
        (0.06, 400, 24),
        (0.03, 100, 3),
        (0.05, 120, 6),
        (0.01, 50, 1),
        (1.0, 7, 7),
        (0.5, 3, 2),
        (0.07, 100, 7),
        (0.28, 50, 14),
        (0.55, 200, 110),
    ],
)
def test_warmup_ratio_is_a_share_rounded_up(ratio: float, steps: int, expected: int) -> None:
    """The last three products are a little more than an integer in floating point."""
    assert warmup_steps(OptimOptions(warmup_ratio=ratio), steps) == expected


def test_warmup_steps_are_taken_as_given() -> None:
    assert warmup_steps(OptimOptions(warmup_steps=9), 5) == 9
    assert warmup_steps(OptimOptions(warmup_steps=0), 5) == 0
    assert warmup_steps(OptimOptions(), 5) == 0
