"""CUDA's driver is started beside the imports, where there is one and it may be wanted."""

import threading

import pytest

from trainer.distributed import cuda_driver


@pytest.mark.parametrize(("device", "wanted"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_it_starts_in_a_thread(device: str, wanted: bool, monkeypatch) -> None:
    calls = []

    class Library:
        def __init__(self, name: str):
            assert name == "libcuda.so.1"

        def cuInit(self, flags: int) -> int:
            calls.append((flags, threading.current_thread().name))
            return 100  # no GPU

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", Library)
    thread = cuda_driver.start_driver(device)
    assert (thread is not None) == wanted
    if thread is not None:
        thread.join()
    assert calls == [(0, "CUDA driver")] * wanted


def test_without_a_driver_nothing_happens(monkeypatch) -> None:
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    thread = cuda_driver.start_driver("cuda")
    assert thread is not None
    thread.join()
    assert raised == []
