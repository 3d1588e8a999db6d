"""Phases of a start: what is said as each begins, and the seconds of all."""

import pytest

from trainer.records import phases


@pytest.fixture
def now(monkeypatch):
    """The time, as the test sets it."""
    time = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: time[0])
    yield time
    phases.end()


def test_phases_are_told_as_they_begin_and_add_up(now):
    said = []
    phases.begin("configuration")
    now[0] += 1
    phases.enter("torch")  # nobody listens yet
    phases.tell(said.append)
    for phase, seconds in (("data", 3), ("model", 2), ("data", 4)):
        now[0] += seconds
        phases.enter(phase)
    now[0] += 0.5
    assert said == ["start     4.0 s: data", "start     6.0 s: model", "start     10.0 s: data"]
    seconds = phases.end()
    assert seconds == {"configuration": 1.0, "torch": 3.0, "data": 2.5, "model": 4.0}
    assert phases.described(seconds) == (
        "10.5 s to the first step: configuration 1.0, torch 3.0, data 2.5, model 4.0"
    )


def test_nothing_is_told_outside_of_a_start(now):
    said = []
    phases.begin("torch")
    phases.tell(said.append)
    phases.end()
    phases.enter("evaluating")
    assert (said, phases.is_begun(), phases.end()) == ([], False, {})


def test_beside_a_bar_lines_go_through_it_where_there_are_any(now):
    said, beside = [], []
    phases.begin("torch")
    phases.tell_beside(beside.append)
    phases.enter("data")
    phases.tell(said.append)
    phases.tell_beside(beside.append)
    phases.enter("evaluating")
    assert (said, beside) == ([], ["start     0.0 s: evaluating"])
