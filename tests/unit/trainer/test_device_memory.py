"""What a run sets aside is collected afterwards."""

import gc
import weakref

import pytest

from trainer.device_memory import modules_set_aside, set_aside


class Ring:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def unfrozen():
    gc.unfreeze()  # of this module's fixtures
    yield
    gc.freeze()


def test_collections_pass_over_what_was_there_before(unfrozen, monkeypatch) -> None:
    """In a process's first run: a later one collects what the one before it has left."""
    monkeypatch.setattr("trainer.device_memory._had_run", False)
    before = weakref.ref(Ring())
    with pytest.raises(KeyError), modules_set_aside():
        within = weakref.ref(Ring())
        gc.collect()
        assert before() is not None and within() is None
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_what_a_process_has_set_aside_stays_so(unfrozen) -> None:
    before = weakref.ref(Ring())
    kept = Ring()
    set_aside()
    assert before() is None
    with modules_set_aside():
        within = weakref.ref(Ring())
    assert gc.get_freeze_count() > 0
    assert not any(one is kept for one in gc.get_objects())  # not gone through
    set_aside()
    assert within() is None
