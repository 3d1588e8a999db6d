"""The next step's micro-batches, prepared in a thread and copied to the device while one runs."""

import concurrent.futures
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from trainer.data.loader import Loader, Step


@dataclass(frozen=True)
class _Prepared:
    step: Step
    position: dict[str, int]
    """Of the loader behind this step."""
    copied: torch.cuda.Event | None
    """When the device has the step's tensors."""


class Prefetcher:
    """The steps of a loader, one ahead. Its position is that of the last step taken.

    A context: its thread ends with it. An error of the thread is raised by the `next_step` that
    would have returned the step.
    """

    def __init__(self, loader: Loader, device: torch.device, steps: int):
        """`steps`: of the rest of the run; nothing is prepared beyond."""
        self._loader, self._device, self._left = loader, device, steps
        self._position = loader.state_dict()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self._pending: concurrent.futures.Future[_Prepared] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._thread.shutdown(cancel_futures=True)

    @property
    def micro_batch_size(self) -> int | None:
        return self._loader.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        """Discards the step that was prepared with another size."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])
            self._pending = None
            self._loader.load_state_dict(self._position)
        self._loader.micro_batch_size = size

    def state_dict(self) -> dict[str, int]:
        """The loader's position behind the last step taken."""
        return self._position

    def next_step(self) -> Step:
        pending, self._pending = self._pending or self._thread.submit(self._prepare), None
        prepared = pending.result()
        self._position = prepared.position
        self._left -= 1
        if self._left > 0:
            self._pending = self._thread.submit(self._prepare)
        if prepared.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(prepared.copied)
            for _, batch in prepared.step.micro_batches:
                # The memory was allocated on the side stream and must not return to it too soon.
                batch.map(lambda tensor: _used_on(tensor, stream))
        return prepared.step

    def _prepare(self) -> _Prepared:
        step, copied = self._loader.next_step(), None
        if self._stream is not None:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                step = replace(
                    step,
                    micro_batches=[(i, batch.map(self._copy)) for i, batch in step.micro_batches],
                )
                copied = torch.cuda.Event()
                copied.record()
        return _Prepared(step, self._loader.state_dict(), copied)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _used_on(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
