"""Work that a GPU does beside its queue: what needs nothing of what is still to come in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream of its own, behind the last `mark`. On a CPU, which has no queue, it is nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._marked: torch.cuda.Event | None = None

    def record_event(self) -> None:
        """What is queued until here is needed."""
        if self._device.type == "cuda":
            self._marked = torch.cuda.Event()
            self._marked.record()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Runs what is inside beside the queue; what is queued afterwards finds it done."""
        if self._device.type != "cuda":
            yield
            return
        queue = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        if self._marked is None:
            self._stream.wait_stream(queue)
        else:
            self._stream.wait_event(self._marked)
        with torch.cuda.stream(self._stream):
            yield
        queue.wait_stream(self._stream)
