"""Work shared among processes: results in order, errors in their place, nobody left behind."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.data import workers
from trainer.data.workers import Workers
from trainer.errors import RunFailed, UserError


@dataclass
class Work:
    """Light enough for processes to start at once."""

    folder: Path

    def __call__(self, piece: int, tick: Callable[[], None] = lambda: None) -> tuple[int, int]:
        if piece == 7:
            raise UserError("piece 7")
        if piece == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        while piece == 200:  # busy for ever
            (self.folder / str(os.getpid())).touch()
        return piece, os.getpid()


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces go to other processes: this one waits until they are ready."""
    take_on = Workers._take_on

    def wait(self: Workers) -> None:
        take_on(self)
        if self._pool is not None:
            self._pool.settled.wait()
            take_on(self)

    monkeypatch.setattr(Workers, "_take_on", wait)


def nothing() -> None: ...


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("others")
def test_results_are_in_order_and_errors_in_their_place(tmp_path: Path) -> None:
    read, seen = [], []

    def pieces():
        for piece in [*range(10, 40), 7, 41, 7]:
            read.append(piece)
            yield piece
        raise ValueError("unreadable")

    with Workers(Work(tmp_path), 2, nothing) as pool, pytest.raises(UserError, match="piece 7"):
        for piece, process in pool.map(pieces()):
            seen.append(process)
            assert piece == 9 + len(seen) and process != os.getpid()
            assert len(read) <= len(seen) + 4  # two pieces a process
    assert len(seen) == 30 and pool.number == 2
    assert not any(map(alive, seen))
    with Workers(Work(tmp_path), 1, nothing) as alone, pytest.raises(UserError, match="piece 7"):
        for piece, process in alone.map(pieces()):
            assert process == os.getpid()
    with Workers(Work(tmp_path), 1, nothing) as alone, pytest.raises(ValueError, match="unread"):
        list(alone.map(p for p in pieces() if p != 7))


@pytest.mark.usefixtures("others")
def test_an_unreadable_piece_waits_for_those_before_it(tmp_path: Path) -> None:
    def pieces():
        yield from (1, 7)
        raise ValueError("unreadable")

    with Workers(Work(tmp_path), 2, nothing) as pool, pytest.raises(UserError, match="piece 7"):
        list(pool.map(pieces()))


@pytest.mark.usefixtures("others")
def test_a_process_that_dies_and_one_that_is_stopped(tmp_path: Path) -> None:
    with Workers(Work(tmp_path), 2, nothing) as pool, pytest.raises(RunFailed, match="fewer"):
        list(pool.map([1, 2, 100, 3]))

    def check() -> None:
        if any(tmp_path.iterdir()):
            raise KeyboardInterrupt

    with Workers(Work(tmp_path), 2, check) as pool, pytest.raises(KeyboardInterrupt):
        list(pool.map([1, 200, 3]))
    (busy,) = tmp_path.iterdir()
    assert not alive(int(busy.name))


@pytest.mark.usefixtures("others")
def test_processes_end_with_this_one(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        with Workers(Work(tmp_path), 2, nothing) as pool:
            list(pool.map([200, 200]))
        os._exit(1)
    while len(busy := list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(alive(int(process.name)) for process in busy):
        time.sleep(0.01)


def test_what_cannot_be_pickled_is_done_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_ALONE", 0.0)
    work = Work(tmp_path)
    work.folder = lambda: None
    with (
        Workers(work, 2, nothing) as pool,
        pytest.raises(UserError, match=r"data.workers: 2 given"),
    ):
        list(pool.map([1]))
    with Workers(work, "auto", nothing) as pool:
        assert list(pool.map([1, 2])) == [(1, os.getpid()), (2, os.getpid())]


def test_small_data_starts_no_process(tmp_path: Path) -> None:
    with Workers(Work(tmp_path), "auto", nothing) as pool:
        assert len(list(pool.map(range(200, 300)[1:]))) == 99
    assert pool._pool is None
