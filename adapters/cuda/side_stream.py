"""Run work on a side stream, concurrently with what is queued on the current one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A CUDA stream that waits for the last recorded event only. A no-op on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def record_event(self) -> None:
        """Make work on the side stream depend on what is queued so far, and on nothing later."""
        if self._device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Context: run on the side stream; the current stream waits for it at exit."""
        if self._device.type != "cuda":
            yield
            return
        queue = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        if self._event is None:
            self._stream.wait_stream(queue)
        else:
            self._stream.wait_event(self._event)
        with torch.cuda.stream(self._stream):
            yield
        queue.wait_stream(self._stream)
