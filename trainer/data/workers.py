"""Work shared among processes, with results in the order of the work.

The processes are forked from a server that has the imports and neither threads nor a GPU. They end
with this process, however it ends: each holds the reading end of a pipe that is open here only.
"""

import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from typing import Any, Literal

from trainer.errors import RunFailed, UserError, first_line

_ALONE = 3.0
"""Seconds that this process works alone before it takes on others, if their number is `auto`: about
what starting them costs."""
_MOST = 16  # for as many one process can read
_EACH = 2  # pieces that a process has, or that wait for it
_LOOK = 0.1  # seconds between two looks whether to stop
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Workers:
    """Context manager. `work` is pickled, and called with one piece at a time: in this process
    until others are ready, then in those."""

    def __init__(
        self, work: Callable[..., Any], number: int | Literal["auto"], check: Callable[[], None]
    ):
        """`check` is called now and then, and raises where the work is to stop."""
        self._work, self._asked, self._check = work, number, check
        self._due = time.monotonic() + (_ALONE if number == "auto" else 0.0)
        self.number = 1
        """Of the processes that work; one is this one."""
        self._pool: _Pool | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def map(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """The result of each piece. An error is raised at its piece, or after the pieces that were
        read before it; only a few pieces are read ahead."""
        reading, failure, is_over = iter(pieces), None, False
        pending: deque[Callable[[], Any]] = deque()
        while not is_over or pending:
            self._take_on()
            while not is_over and len(pending) < max(1, _EACH * self.number * (self.number > 1)):
                try:
                    pending.append(self._begin(next(reading)))
                except StopIteration:
                    is_over = True
                except Exception as error:
                    failure, is_over = error, True
            if pending:
                yield pending.popleft()()
        if failure is not None:
            raise failure

    def _take_on(self) -> None:
        """Start other processes when they are due, and use them once they are ready."""
        if self._pool is None and time.monotonic() >= self._due:
            number = _cores() if self._asked == "auto" else self._asked
            self._due = float("inf")
            if number > 1:
                self._pool = self._start(number)
        if self._pool is not None and self.number == 1:
            if self._pool.failure is not None and self._asked != "auto":
                raise self._pool.failure
            self.number = self._pool.number if self._pool.is_ready else 1

    def _start(self, number: int) -> "_Pool | None":
        try:
            return _Pool(pickle.dumps(self._work), number, _modules(self._work))
        except Exception as error:  # what pickle raises depends on the object
            if self._asked == "auto":
                return None
            raise UserError(
                f"data.workers: {number} given, but the tokenizer cannot be sent to other "
                f"processes ({first_line(error)}); accepted: 1"
            ) from error

    def _begin(self, piece: Any) -> Callable[[], Any]:
        if self.number == 1 or self._pool is None:
            return partial(self._work, piece, self._check)
        return partial(self._result, self._pool.submit(piece))

    def _result(self, future: Future) -> Any:
        while not wait([future], _LOOK).done:
            self._check()
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _ended(self.number) from error


class _Pool:
    """Processes that are started, and owned, by a thread: starting them takes seconds."""

    def __init__(self, work: bytes, number: int, modules: list[str]):
        self.number = number
        self._modules = modules
        self._reader, self._writer = get_context("spawn").Pipe(duplex=False)
        self._executor: ProcessPoolExecutor | None = None
        self.failure: UserError | None = None
        """Why they could not be started."""
        self.settled = threading.Event()
        """Set once they have started, or could not be."""
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._own, args=(work,), daemon=True, name="start of workers"
        )
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._executor is not None

    def submit(self, piece: Any) -> Future:
        assert self._executor is not None
        return self._executor.submit(_do, piece)

    def close(self) -> None:
        """End the processes, whatever they do. Those that are still being started end as soon as
        they have."""
        self._writer.close()
        self._closed.set()
        if self._executor is not None:
            self._thread.join()

    def _own(self, work: bytes) -> None:
        with _SERVER:
            context = get_context("forkserver")
            context.set_forkserver_preload(["__main__", *self._modules])
            executor = ProcessPoolExecutor(
                self.number, mp_context=context, initializer=_set_up, initargs=(work, self._reader)
            )
            try:
                for started in [executor.submit(_is_set_up) for _ in range(self.number)]:
                    started.result()
                self._executor = executor
                self.settled.set()
                self._closed.wait()
            except BrokenProcessPool:
                self.failure = _ended(self.number)
            except (UserError, OSError) as error:
                self.failure = UserError(f"data.workers: {first_line(error)}; accepted: 1")
            finally:
                self.settled.set()
                executor.shutdown(cancel_futures=True)
                self._reader.close()
                forkserver._forkserver._stop()  # type: ignore[attr-defined] # else it stays, with all that it has imported


def _ended(number: int) -> RunFailed:
    return RunFailed(
        f"data.workers: one of {number} processes was ended from outside, perhaps for lack of "
        "memory; accepted: fewer of them (what was tokenised so far is kept)"
    )


_SERVER = threading.Lock()
"""A process has one server of forks."""
_work: Any = None
"""In a worker: what it does."""


def _set_up(work: bytes, life: Connection) -> None:
    global _work
    for number in _IGNORED:  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(life,), daemon=True, name="parent").start()
    try:
        _work = pickle.loads(work)
    except Exception as error:
        _work = error


def _end_with(life: Connection) -> None:
    with suppress(EOFError, OSError):
        life.recv()
    os._exit(0)


def _is_set_up() -> None:
    if isinstance(_work, Exception):
        raise UserError(f"the tokenizer cannot be sent to other processes ({first_line(_work)})")


def _do(piece: Any) -> Any:
    return _work(piece)


def _modules(work: Any) -> list[str]:
    """What the processes import before they are forked."""
    parts = [work, *vars(work).values(), *(vars(getattr(work, "task", work)).values())]
    return sorted({type(part).__module__ for part in parts})


def _cores() -> int:
    """Of this machine, or those that the container or the process may use."""
    from joblib import cpu_count

    return min(_MOST, cpu_count())
