"""A time limit for Python code of others, such as a chat template with nested loops."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import UserError

_EVERY = 0.1  # seconds between two looks


class _TooLongError(BaseException):
    """No Exception: what runs may catch those."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raises UserError(`message`) in the context once this thread has computed for that long there
    (CPU time, so that a busy machine changes nothing). A call into C is not interrupted."""
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + seconds
    ended, lock = threading.Event(), threading.Lock()

    def raise_in_thread(error: type[BaseException] | None) -> None:
        target = None if error is None else ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), target)

    def watch() -> None:
        while not ended.wait(_EVERY):
            with lock:
                if not ended.is_set() and time.clock_gettime(clock) > end:
                    raise_in_thread(_TooLongError)
                    return

    threading.Thread(target=watch, daemon=True, name="time limit").start()
    try:
        try:
            yield
        finally:
            with lock:
                ended.set()
            raise_in_thread(None)  # one that was set, and not yet raised
    except _TooLongError:
        raise UserError(message) from None
