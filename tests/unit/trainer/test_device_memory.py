"""What a run sets aside is collected afterwards."""

import gc
import weakref

import pytest

from trainer.device_memory import modules_set_aside


class Ring:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_collections_pass_over_what_was_there_before(monkeypatch) -> None:
    """In a process's first run: a later one collects what the one before it has left."""
    monkeypatch.setattr("trainer.device_memory._was_set_aside", False)
    before = weakref.ref(Ring())
    with pytest.raises(KeyError), modules_set_aside():
        within = weakref.ref(Ring())
        gc.collect()
        assert before() is not None and within() is None
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None
