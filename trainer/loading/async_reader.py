"""Asynchronous reads of byte ranges of files into tensors on a device.

Read, not memory-mapped: mapped pages count as this process's memory, and a single thread faulting
them in cannot saturate a fast disk. Data for a GPU passes through a few pinned buffers, the only
host memory used.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch
import xxhash
from torch import Tensor

from trainer.errors import UserError

_PIECE = 8 * 2**20  # bytes per read; larger reads are no faster
_THREADS = 4  # per rank; more are no faster, since all ranks of a host share a disk


class Reader:
    """Reads in background threads; `bytes_read` counts the bytes requested, and `digests` holds
    the XXH3-128 of what was read, by file and offset."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes_read = 0
        self.digests: dict[tuple[Path, int], bytes] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reading")
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        self._stream: torch.cuda.Stream | None = None

    def begin(
        self, file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Start to read the tensor at `offset`. Returns a function that waits for the tensor and
        returns it; it raises UserError where the file is unreadable or too short."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        data = tensor.reshape(-1).view(torch.uint8)
        if self.device.type == "cuda":
            self._prepare_copies()
        self.bytes_read += data.numel()
        pieces: list[Future[bytes]] = [
            self._pool.submit(self._fill, data[start : start + _PIECE], file, offset + start)
            for start in range(0, data.numel(), _PIECE)
        ]

        def wait() -> Tensor:
            digests = b"".join(piece.result() for piece in pieces)
            self.digests[file, offset] = xxhash.xxh3_128_digest(digests)
            return tensor

        return wait

    def _prepare_copies(self) -> None:
        if self._stream is None:
            # A side stream: copies do not wait for the kernels in the current one.
            self._stream = torch.cuda.Stream(self.device)
            for _ in range(_THREADS):
                self._buffers.put(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True))
        # Queued kernels may still use the memory of the new tensor.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _fill(self, target: Tensor, file: Path, offset: int) -> bytes:
        """Read a piece; returns its digest."""
        if self._stream is None:
            data = target.numpy().data
            read_into(data, file, offset)
            return xxhash.xxh3_128_digest(data)
        buffer = self._buffers.get()
        try:
            piece = buffer[: target.numel()]
            read_into(piece.numpy().data, file, offset)
            with torch.cuda.stream(self._stream):
                target.copy_(piece, non_blocking=True)
                copied = self._stream.record_event()
            digest = xxhash.xxh3_128_digest(piece.numpy().data)  # while it is copied
            copied.synchronize()
            return digest
        finally:
            self._buffers.put(buffer)


def read_into(memory: memoryview, file: Path, offset: int) -> None:
    """Fill `memory` with a file's bytes from `offset`. Raises UserError where the file is
    unreadable or too short."""
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while memory:
                count = stream.readinto(memory)
                if not count:
                    raise ValueError(f"the file ends {len(memory)} bytes too early")
                memory = memory[count:]
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> UserError:
    """The error for a weight file that cannot be read."""
    return UserError(f"model.id: {file}: not a readable safetensors file ({error})")
