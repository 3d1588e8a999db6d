"""Byte ranges of files into tensors on a device, several pieces of a tensor at a time.

Read, not mapped: a mapped file's pages count as this process's memory while it is open, and one
thread that faults them in leaves a fast disk idle. On the way to a GPU a piece passes through one
of a few pinned buffers, which are all that the host ever holds.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from trainer.errors import UserError

_PIECE = 8 * 2**20  # bytes; larger ones read no faster
_THREADS = 4  # a rank; more gain nothing on one disk, of which all ranks of a node read


class Reader:
    """Reads in the background; `bytes_read` counts what was asked of the files."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes_read = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reading")
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        self._stream: torch.cuda.Stream | None = None

    def begin(
        self, file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Begin to read a tensor that lies at `offset`; what is returned waits for it and gives it.

        Raises UserError when called, where the file cannot be read that far.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        data = tensor.reshape(-1).view(torch.uint8)
        if self.device.type == "cuda":
            self._prepare_copies()
        self.bytes_read += data.numel()
        pieces: list[Future] = [
            self._pool.submit(self._fill, data[start : start + _PIECE], file, offset + start)
            for start in range(0, data.numel(), _PIECE)
        ]

        def wait() -> Tensor:
            for piece in pieces:
                piece.result()
            return tensor

        return wait

    def _prepare_copies(self) -> None:
        if self._stream is None:
            # On a stream of their own copies do not wait for what the device computes meanwhile.
            self._stream = torch.cuda.Stream(self.device)
            for _ in range(_THREADS):
                self._buffers.put(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True))
        # What the new tensor's memory was used for before is queued already, but may not be done.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _fill(self, target: Tensor, file: Path, offset: int) -> None:
        if self._stream is None:
            read_into(target.numpy().data, file, offset)
            return
        buffer = self._buffers.get()
        try:
            piece = buffer[: target.numel()]
            read_into(piece.numpy().data, file, offset)
            with torch.cuda.stream(self._stream):
                target.copy_(piece, non_blocking=True)
                copied = self._stream.record_event()
            copied.synchronize()
        finally:
            self._buffers.put(buffer)


def read_into(memory: memoryview, file: Path, offset: int) -> None:
    """Fill `memory` with a file's bytes from `offset`. UserError where it cannot be read so far."""
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while memory:
                count = stream.readinto(memory)
                if not count:
                    raise ValueError(f"it ends {len(memory)} bytes too early")
                memory = memory[count:]
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> UserError:
    """What a user hears of a file of weights that cannot be read."""
    return UserError(f"model.id: {file}: not a readable safetensors file ({error})")
