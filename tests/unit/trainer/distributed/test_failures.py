"""Ranks that fail in one stage, without a collective."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from tests.helpers import quick_config
from trainer.distributed import failures
from trainer.distributed.failures import FailedElsewhere, also_failing
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.session import open_session
from trainer.verification import verify


def test_ranks_that_fail_alike_know_of_each_other() -> None:
    store, together = HashStore(), threading.Barrier(3)

    def fail(rank: int) -> set[int]:
        together.wait()
        return also_failing("stage", rank, 3, store)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(fail, range(3))) == [{0, 1, 2}] * 3


def test_a_rank_that_fails_alone_waits_for_nobody(monkeypatch) -> None:
    monkeypatch.setattr(failures, "_GRACE", 0.0)
    store = HashStore()
    store.set("failing/another stage/0", "")
    assert also_failing("stage", 1, 2, store) == {1}
    assert also_failing("stage", 0, 1) == {0}


def test_one_rank_reports_an_error_of_a_proof_at_once(tmp_path, monkeypatch) -> None:
    """Which one is known by the store alone: nothing is collective."""
    session = open_session(quick_config(tmp_path), World())
    object.__setattr__(session, "world", World(rank=1, size=2))
    full = torch.OutOfMemoryError("CUDA out of memory")
    for failing, error, raised in (
        ({1}, KeyError("k"), KeyError),
        ({0, 1}, KeyError("k"), FailedElsewhere),
        ({1}, full, UserError),
        ({0, 1}, full, None),
    ):
        monkeypatch.setattr(verify, "also_failing", lambda *_, failing=failing: failing)
        if raised is None:
            verify._end_or_go_on(session, "buffers", error)
            continue
        with pytest.raises(raised) as found:
            verify._end_or_go_on(session, "buffers", error)
        assert type(found.value) is raised
    assert str(verify._short(session, "buffers", full)).startswith("run.verify: off given, but GPU")
