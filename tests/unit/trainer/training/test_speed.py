"""What is logged of a run's speed."""

import numpy as np
import pytest

from trainer.engine.base import Update
from trainer.model.flops import ModelFlops
from trainer.records.metrics import speed
from trainer.training import speed as speeds
from trainer.training.speed import Clock, Peak
from trainer.training.step import StepDone

MODEL = ModelFlops(matrices=100, head=10, per_pair=0, windows=[], causal=True, trains=False)


def done(lengths, learned):
    return StepDone(
        Update(1.0, 1.0, skipped=False), sum(lengths), np.array(lengths), learned, 0.5, None
    )


@pytest.fixture
def seconds(monkeypatch):
    """The time, as the test sets it."""
    now = [0.0]
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: now[0])
    return now


def test_speed_is_of_all_ranks_of_a_gpu_and_of_its_peak(seconds):
    clock = Clock(Peak(MODEL, flops=100_000.0))
    clock.count(done([30, 10], learned=20))
    with clock.paused():
        seconds[0] += 100
    clock.count(done([60], learned=60))
    seconds[0] += 2
    work = 4 * (100 * 100 + 10 * 80)
    assert clock.figures(gpus=4) == {
        "tokens_per_second": 50.0, "tokens_per_second_per_gpu": 12.5,
        "mfu": pytest.approx(work / 2 / 4 / 100_000), "step_seconds": 1.0,
    }  # fmt: skip


def test_what_is_not_known_is_absent(seconds):
    for gpus, keys in ((0, {"tokens_per_second", "step_seconds"}),
                       (2, {"tokens_per_second", "tokens_per_second_per_gpu", "step_seconds"})):  # fmt: skip
        clock = Clock()
        clock.count(done([8], learned=8))
        seconds[0] += 1
        assert clock.figures(gpus).keys() == keys


def test_speed_in_words():
    assert speed({"tokens_per_second": 14500.4}) == "14,500 tokens/s"
    assert speed({"tokens_per_second": 14500.4, "mfu": 0.4249}) == "14,500 tokens/s (42% MFU)"
