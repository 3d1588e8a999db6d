"""Broadcast and all-gather msgpack objects in one collective with fixed-size buffers.

torch's object collectives are pickles, which whoever reaches the port could make run anything, and
send sizes first, which takes a second collective. Here the buffer has room for the messages of a
training step; only a message that does not fit takes a second round, with buffers of the longest
message's size. What arrives is plain data of the types that were sent: msgpack's own, and tuples,
paths and tensors.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

MESSAGE_BYTES = 2**15
"""Buffer of a broadcast: a decision about 640 units takes 6 KB, AdaLoRA's with 24 components each
18 KB."""

DIGEST_BYTES = 2**8
"""Buffer of an all-gather: an exit code and a digest."""

HEADER = 8
"""Bytes of the length prefix."""

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""A collective: this rank's buffer (bytes) → the received buffers (ranks, bytes). All ranks call it
with buffers of one size."""


def exchange(value: Any, exchange_buffers: Exchange, size: int) -> list[Any]:
    """The values of the ranks whose buffers the collective returns, in their order. `size`: bytes
    of the first round's buffer."""
    message = encoded(value)
    received = exchange_buffers(_buffer(message, size)).numpy()
    lengths = [int(buffer[:HEADER].view(np.int64)[0]) for buffer in received]
    if max(lengths) > size - HEADER:
        received = exchange_buffers(_buffer(message, HEADER + max(lengths))).numpy()
    return [
        decoded(buffer[HEADER : HEADER + length])
        for buffer, length in zip(received, lengths, strict=True)
    ]


def encoded(value: Any) -> bytes:
    """A value as a message. Raises TypeError where it is not plain data."""
    return msgpack.packb(
        value, default=_extended, strict_types=True, unicode_errors="surrogatepass"
    )


def decoded(message: Any) -> Any:
    """The value of a message (bytes)."""
    return msgpack.unpackb(
        message, ext_hook=_plain, strict_map_key=False, unicode_errors="surrogatepass"
    )


_TUPLE, _PATH, _TENSOR = range(3)


def _extended(value: Any) -> Any:
    """What msgpack does not know, as it knows it; subclasses of what it knows are their base."""
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, encoded(list(value)))
    if isinstance(value, Path):
        return msgpack.ExtType(_PATH, os.fsencode(value))
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
        dtype = str(value.dtype).removeprefix("torch.")
        return msgpack.ExtType(_TENSOR, encoded([dtype, list(value.shape), data]))
    kinds: tuple[Any, ...] = (int, float, str, dict, list)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def _plain(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(decoded(data))
    if code == _PATH:
        return Path(os.fsdecode(data))
    dtype, shape, held = decoded(data)
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    if held:
        tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(held, dtype=np.uint8)
    return tensor


def _buffer(message: bytes, size: int) -> torch.Tensor:
    """The length prefix and as much of the message as fits."""
    buffer = np.zeros(size, dtype=np.uint8)
    buffer[:HEADER] = np.frombuffer(len(message).to_bytes(HEADER, "little"), dtype=np.uint8)
    fitting = message[: size - HEADER]
    buffer[HEADER : HEADER + len(fitting)] = np.frombuffer(fitting, dtype=np.uint8)
    return torch.from_numpy(buffer)
