"""The last few of many, and functions that are recorded."""

import numpy as np
import pytest
import torch

from adapters.cuda.graph_replay import GraphReplay
from adapters.methods.lelora.window import SlidingWindow


@pytest.mark.parametrize("held", [0, 2, 5])
def test_the_newest_stay_in_order_and_in_place(held):
    rows = np.random.default_rng(0).normal(size=(9, 2, 3))
    recent = SlidingWindow(4, torch.from_numpy(rows[:held]))
    place = recent.padded.data_ptr()
    for count in range(held, 9):
        there = min(count, 4)
        assert len(recent) == there and bool(recent) == (count > 0)
        np.testing.assert_array_equal(recent.all.numpy(), rows[count - there : count])
        np.testing.assert_array_equal(
            recent.padded[4 - there :].numpy(), rows[count - there : count]
        )
        assert recent.padded[: 4 - there].isnan().all()
        recent.push_(torch.from_numpy(rows[count]))
        recent.counted()
    assert recent.padded.data_ptr() == place


def test_what_is_not_recorded_runs_every_time():
    seen = []

    def function(a, b):
        seen.append(float(a))
        return (a + b,)

    replayed = GraphReplay(function, enabled=False)
    for value in (1.0, 2.0, 3.0):
        assert float(replayed(torch.tensor(value), torch.tensor(10.0))[0]) == value + 10
    assert seen == [1.0, 2.0, 3.0]
